"""The processes of megalm preprocess: whichever dies, fails to start, or is in work when somebody wants an end, none stays."""
from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.data.errors import DataError
from megalm.data.tokenizer import BytesTokenizer
from megalm.tools._command import Terminated, hearing_sigterm
from megalm.tools.preprocess.job import Job, Worker
from megalm.tools.preprocess.pool import Pool
from megalm.tools.preprocess.tasks import Task
from megalm.tools.preprocess.texts import Policy
from tests.data.models import make_sentencepiece
from tests.tools.test_preprocess import json_lines, read, refused, run, wait_for

LONG = 60  # seconds that nobody should wait


class Slow:
    """Keeps the process that unpickles it busy."""

    def __reduce__(self):
        return time.sleep, (LONG,)


def pool_of_two(folder: Path) -> Pool:
    return Pool(Worker(Job(Policy("text"), "<u2", str(folder), (), 1000), BytesTokenizer()), [], 2)


@contextlib.contextmanager
def none_is_left() -> Iterator[None]:
    """No process stays, and nobody has waited for one that would; these are killed, so that the test ends."""
    late = threading.Timer(LONG / 2, lambda: [child.kill() for child in multiprocessing.active_children()])
    late.start()
    try:
        yield
        assert late.is_alive(), "somebody waited"
        assert multiprocessing.active_children() == []
    finally:
        late.cancel()
        for child in multiprocessing.active_children():
            child.kill()


def asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


@pytest.mark.parametrize("which", [0, 1])
def test_one_is_killed_while_both_wait(tmp_path, which):
    """One of two holds the lock of the queue that they wait for; the other gets a long piece of work. The error comes at once."""
    with none_is_left(), pytest.raises(DataError, match="a worker process died"), pool_of_two(tmp_path) as pool:
        wait_for(lambda: all(asleep(process.pid) for process in pool.processes))
        time.sleep(0.2)  # they have started, and sleep for want of work
        os.kill(pool.processes[which].pid, signal.SIGKILL)
        list(pool.make([Task(number, Slow()) for number in range(4)], False, False))


def test_one_is_killed_while_the_other_works(tmp_path):
    with none_is_left(), pytest.raises(DataError, match="a worker process died"), pool_of_two(tmp_path) as pool:
        threading.Timer(0.3, os.kill, (pool.processes[0].pid, signal.SIGKILL)).start()
        list(pool.make([Task(number, Slow()) for number in range(6)], False, False))


def test_the_second_process_cannot_be_started(tmp_path, monkeypatch, capsys):
    real, calls = os.fork, []

    def fork():
        calls.append(1)
        if len(calls) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real()

    path = json_lines(tmp_path / "a.jsonl", ["a"] * 20)
    monkeypatch.setattr(os, "fork", fork)
    with none_is_left():
        err = refused(capsys, "--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--workers", 2,
                      "--piece-bytes", 20)
    assert err == f"error: {tmp_path}/out: Resource temporarily unavailable; nothing was written\n" and len(calls) == 2
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_signal_while_an_error_waits_for_the_others(tmp_path):
    with none_is_left(), hearing_sigterm(), pytest.raises(Terminated), pool_of_two(tmp_path) as pool:
        signals = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
        try:
            list(pool.make([Task(0, ()), *(Task(number, Slow()) for number in (1, 2))], False, False))
        finally:
            signals.start()


SAMPLING = f"""import pathlib, sys, time
from megalm.tools.preprocess import main, pool
pool.corpus_samples = lambda *_: (pathlib.Path(sys.argv[1]).touch(), time.sleep({LONG}))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM"),
                                          (signal.SIGKILL, None)])
def test_ended_while_a_process_looks_for_samples(tmp_path, number, word):
    """Which ends too: whoever reads stderr sees its end. A SIGKILL is for the program alone."""
    path, model = json_lines(tmp_path / "a.jsonl", ["a text"] * 20), make_sentencepiece(tmp_path / "spm.model")
    command = ("--input", path, "--output", f"{tmp_path}/out", "--tokenizer", str(model), "--workers", "2", "--piece-bytes", "50",
               "--quiet")
    process = subprocess.Popen([sys.executable, "-c", SAMPLING, str(tmp_path / "begun"), *command], start_new_session=True,
                               stderr=subprocess.PIPE, text=True)
    try:
        wait_for((tmp_path / "begun").exists)
        (os.kill if word is None else os.killpg)(process.pid, number)
        err = process.communicate(timeout=LONG / 2)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (process.returncode, err) == ((-number, "") if word is None else (128 + number, f"{word}; nothing was written\n"))
    assert not (tmp_path / "out.bin").exists() and (tmp_path / "out.work").exists() == (word is None)
    assert run(*command) == 0 and len(read(tmp_path / "out")) == 20
