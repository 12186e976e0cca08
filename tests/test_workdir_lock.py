"""A folder is locked for one process, and no dead process keeps it locked."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from etils import epath

from lidit_jax import workdir_lock
from lidit_jax.errors import UserError
from lidit_jax.workdir_lock import lock

HOLDER = """
import sys, time
from etils import epath
from lidit_jax.workdir_lock import lock
with lock(epath.Path(sys.argv[1]), "the workdir"):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def file(tmp_path):
    return epath.Path(tmp_path / "workdir/run.lock")


@pytest.fixture
def impatient(monkeypatch):
    for name, value in {"DEAD_AFTER_S": 0.5, "BEAT_S": 0.05, "POLL_S": 0.05}.items():
        monkeypatch.setattr(workdir_lock, name, value)


@pytest.fixture
def without_kernel_locks(monkeypatch):
    monkeypatch.setattr(workdir_lock, "_lock_in_kernel", lambda *arguments: False)


def hold_elsewhere(file):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_lock_is_gone_after_the_context_also_after_errors(file):
    with lock(file, "the workdir"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    with pytest.raises(OSError, match="the body's"), lock(file, "the workdir"):
        raise OSError("the body's")
    assert not file.exists()


def test_a_second_process_is_told_who_has_the_lock_and_takes_over_when_that_was_killed(file, caplog):
    other = hold_elsewhere(file)
    named = rf"the workdir is in use by process {other.pid} on host .+ since 20.+: wait until it ends, end it there, or"
    with pytest.raises(UserError, match=named), lock(file, "the workdir"):
        pass
    other.kill()
    other.wait()
    with lock(file, "the workdir"):
        assert f"taking over the lock of process {other.pid}" in caplog.text
    assert not file.exists()


def test_two_locks_in_one_process_exclude_each_other(file):
    with lock(file, "a"), pytest.raises(UserError, match="in use"), lock(file, "a"):
        pass


def facts(**changes):
    return {**workdir_lock._this_process(), "pid": 1, "since": "2026", "token": "0", "beat": 1} | changes


def test_without_kernel_locks_a_dead_process_of_this_host_is_known_by_its_id(file, without_kernel_locks, caplog):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file.parent.mkdir()
    file.write_text(json.dumps(facts(pid=gone.pid)))
    with lock(file, "the workdir"):
        assert "which is no longer running" in caplog.text


@pytest.mark.parametrize("kernel_locks", [True, False])
def test_a_silent_lock_of_another_host_is_taken_over(file, impatient, monkeypatch, caplog, kernel_locks):
    if not kernel_locks:
        monkeypatch.setattr(workdir_lock, "_lock_in_kernel", lambda *arguments: False)
    file.parent.mkdir()
    file.write_text(json.dumps(facts(host="tpu-7", boot="other")))
    with lock(file, "the workdir"):
        assert "locked by process 1 on host tpu-7 since 2026: waiting up to" in caplog.text
        assert "which gave no sign of life" in caplog.text


def test_a_beating_lock_of_another_host_is_respected(file, impatient, without_kernel_locks, monkeypatch):
    with lock(file, "the workdir"):
        monkeypatch.setattr(workdir_lock, "_this_process", lambda: {"pid": 5, "host": "tpu-8", "boot": "other"})
        with pytest.raises(UserError, match="in use by process"), lock(file, "the workdir"):
            pass
    assert not file.exists()


def test_a_lock_that_is_being_written_is_not_given_up(file, impatient, without_kernel_locks, monkeypatch):
    file.parent.mkdir()
    file.write_text("")
    found = iter([facts(host="tpu-7", boot="other"), {}, facts(host="tpu-7", boot="other", beat=2)])
    monkeypatch.setattr(workdir_lock, "_read", lambda file: next(found))
    with pytest.raises(UserError, match="in use by process 1 on host tpu-7"), lock(file, "the workdir"):
        pass


def test_a_lock_that_was_being_written_at_first_is_respected(file, impatient, without_kernel_locks, monkeypatch):
    file.parent.mkdir()
    file.write_text("")
    found = iter([{}, facts(host="tpu-7", boot="other"), facts(host="tpu-7", boot="other", beat=2)])
    monkeypatch.setattr(workdir_lock, "_read", lambda file: next(found))
    with pytest.raises(UserError, match="in use by process 1 on host tpu-7"), lock(file, "the workdir"):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x"}', '{"pid": 1e400}', "[" * 200_000])
def test_damaged_lock_files_are_taken_over(file, impatient, caplog, content):
    file.parent.mkdir()
    file.write_text(content)
    with lock(file, "the workdir"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert ("taking over the lock" in caplog.text) == bool(content)


def test_a_folder_that_can_not_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"), lock(epath.Path(tmp_path / "file/run.lock"), "x"):
        pass


def test_a_folder_in_place_of_the_lock_file_is_named(file):
    file.mkdir(parents=True)
    message = f"the workdir can't be written: {file}: Is a directory"
    with pytest.raises(UserError, match=message), lock(file, "the workdir"):
        pass


def test_on_a_full_disk_no_lock_stays(file, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workdir_lock._Holder, "_write", full)
    message = "the workdir can't be written: No space left on device: free disk"
    with pytest.raises(UserError, match=message), lock(file, "the workdir"):
        raise AssertionError
    assert not file.exists()


def test_without_kernel_locks_as_on_windows_the_holder_is_waited_for(file, impatient, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    with lock(file, "the workdir"), pytest.raises(UserError, match="in use by process"), lock(file, "the workdir"):
        pass
    file.write_text(json.dumps({**workdir_lock._this_process(), "pid": os.getpid()}))
    with lock(file, "the workdir"):
        assert "gave no sign of life" in caplog.text


def test_no_module_imports_what_windows_lacks_before_it_is_used():
    at_the_top = re.compile(r"^(import|from) (fcntl|resource|pwd|grp|termios)\b", re.M)
    sources = list((ROOT / "lidit_jax").rglob("*.py"))
    assert sources and not [source for source in sources if at_the_top.search(source.read_text())]
