"""SIGTERM and Ctrl-C end a command in one line, wherever they come; processes stand for commands."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT

from lidit_jax.parallel.preemption import Notice, Preempted, activity, catch_sigterm

COMMAND = """
import sys, time
from lidit_jax.parallel import preemption
from lidit_jax.parallel.preemption import Preempted, activity, catch_sigterm, interruptible

def ready():
    print("ready", flush=True)

def main():
    {body}

try:
    with interruptible():
        main()
except Preempted as stop:
    print(stop, file=sys.stderr, flush=True)
    sys.exit(0)
"""


def start(body, command=COMMAND):
    """Starts a process that runs `body`, and waits until it prints "ready"."""
    code = command.format(body=body.strip().replace("\n", "\n    "))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process):
    """Returns the exit status and what was written to stderr."""
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_ends_whatever_does_not_poll_in_one_line(number, name):
    process = start("with activity('loading the encoders'):\n    ready()\n    time.sleep(60)")
    process.send_signal(number)
    assert end(process) == (0, f"stopped by {name} while loading the encoders; run it again to resume\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_that_polls_ends_at_its_next_step(number):
    body = "with catch_sigterm() as notice:\n    ready()\n    while not notice.received:\n        time.sleep(0.01)"
    process = start(body + "\n    raise notice.stopped('toy', 'after step 7')")
    process.send_signal(number)
    status, error = end(process)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert (status, error) == (0, f"toy: stopped by {name} after step 7; run it again to resume\n")


WAITS = "with catch_sigterm() as notice, activity('saving step 7'):\n    ready()\n    time.sleep({})"
REMINDED = "preemption.REMINDER_S = 0.1\n" + WAITS


def send_first(process, number):
    """Sends a process of REMINDED its first signal, and waits until it says what it waits for."""
    process.send_signal(number)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert process.stderr.readline() == f"{name}: waiting for saving step 7 to finish (Ctrl-C kills it)\n"


def test_what_a_stopping_process_waits_for_is_said():
    process = start(REMINDED.format(3))
    send_first(process, signal.SIGTERM)
    assert end(process) == (0, "stopped by SIGTERM\n")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_a_signal_kills(first):
    process = start(REMINDED.format(60))
    send_first(process, first)
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "killed by Ctrl-C; the last checkpoint is kept\n")


def test_ctrl_c_twice_kills_the_processes_of_the_command_too():
    waits = f"subprocess.Popen(['{sys.executable}', '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    body = f"import subprocess\nwith preemption.dies_with_this({waits}) as session:\n"
    body += "    print(session.pid, file=sys.stderr, flush=True)\n" + textwrap.indent(REMINDED.format(60), "    ")
    process = start(body)
    child = int(process.stderr.readline())
    send_first(process, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "killed by Ctrl-C; the last checkpoint is kept\n")
    stat = Path(f"/proc/{child}/stat")
    end_s = time.monotonic() + 20  # SIGKILL is sent before the command ends, and takes effect at the kernel's leisure
    while is_running(stat):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def is_running(stat):
    """Tells whether the process of a /proc/PID/stat is neither gone nor a zombie."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second one when it goes between open and read
        return False


def test_a_signal_in_a_destructor_which_ignores_exceptions_ends_the_command_too():
    body = """
class Destructed:
    def __del__(self):
        ready()
        time.sleep(1)

with activity("importing"):
    Destructed()
    time.sleep(60)
"""
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "stopped by SIGTERM while importing; run it again to resume\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_an_extension_module_is_loaded_waits_for_it(number):
    body = """
import importlib.machinery

class Loader(importlib.machinery.ExtensionFileLoader):
    def exec_module(self, module):  # as C++ code that imports NumPy
        try:
            ready()
            time.sleep(1)
        except BaseException as error:
            raise ImportError("numpy failed to import") from error
        print("loaded", file=sys.stderr, flush=True)

with activity("starting"):
    Loader("extension", "extension.so").exec_module(None)
    time.sleep(60)
"""
    process = start(body)
    process.send_signal(number)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert end(process) == (0, f"loaded\nstopped by {name} while starting; run it again to resume\n")


def test_sigterm_twice_does_not_kill():
    process = start(WAITS.format(1))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert end(process) == (0, "stopped by SIGTERM\n")


def test_a_signal_after_the_end_changes_nothing():
    process = start("import atexit\natexit.register(time.sleep, 1)\natexit.register(ready)")
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "")


def test_a_signal_that_came_between_two_loops_is_raised_at_the_next():
    notice = Notice()
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        notice.handle(signal.SIGTERM)
    with pytest.raises(Preempted), notice.polled():  # the first was swallowed, as exceptions in __del__ are
        raise AssertionError


def test_evaluations_are_interrupted_within_a_loop_that_polls():
    before = signal.getsignal(signal.SIGINT)
    with catch_sigterm() as notice:
        with pytest.raises(Preempted), notice.interrupting(), activity("evaluating"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert notice.received
        notice.number = None
    assert signal.getsignal(signal.SIGINT) is before


CLI = """
import sys, time
from lidit_jax import cli

def ready():
    print("ready", flush=True)

def main():
    {body}

cli.run(main, resumable="--resumable" in sys.argv.pop())
"""


NOT_RESUMABLE = "import sys\nsys.argv.append('')\n"


@pytest.mark.parametrize(("resumable", "status"), [(True, 0), (False, 143)])
def test_commands_that_resume_end_with_0_and_others_with_143(resumable, status):
    argument = f"sys.argv.append('{'--resumable' if resumable else ''}')\n"
    process = start("ready()\ntime.sleep(60)", "import sys\n" + argument + CLI)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (status, "stopped by SIGTERM\n")


def test_a_stopped_command_ends_without_the_shutdown_of_python_in_which_libraries_may_crash():
    process = start("import atexit, os\natexit.register(os.abort)\nready()\ntime.sleep(60)", NOT_RESUMABLE + CLI)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "stopped by SIGTERM\n")
