"""One job at a time in a run's folder."""
from __future__ import annotations

import errno
import fcntl
import os
import signal

import pytest

from megalm.checkpoint import CheckpointError, find, hold
from megalm.checkpoint.resume import choose
from tests.checkpoint.fakes import save_all
from tests.checkpoint.test_failures import OLD, ranks
from tests.checkpoint.test_layouts import succeed


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
    with hold(tmp_path):
        with pytest.raises(CheckpointError, match=rf"in use by another job \(.*, pid {os.getpid()}, since 20") as error:
            hold(tmp_path)
        line = str(error.value)
        assert line.startswith(f"train.dir {tmp_path} is") and f"delete {tmp_path}/.lock" in line and "\n" not in line
    hold(tmp_path).close()


def test_a_killed_job_leaves_the_folder_free(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lock = hold(tmp_path)
        os.write(writer, b"held")
        signal.pause()
        lock.close()
        os._exit(0)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(CheckpointError, match=f"pid {child},"):
        hold(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hold(tmp_path).close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_out(number, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path), hold(tmp_path):
        pass


def test_another_error_is_passed_on(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        hold(tmp_path)


def test_a_locked_folder_can_be_read_and_a_lock_makes_no_run(tmp_path):
    with hold(tmp_path):
        assert choose(tmp_path, "never") is None
        succeed(save_all(tmp_path, 1, ranks(OLD)))
        assert find(tmp_path).name == "step_00000001"
