"""A run that is stopped, in any way and at any moment, goes on with the same command to the same bytes."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import threading
from pathlib import Path

import pytest

from megalm.data.errors import DataError
from megalm.tools._command import Terminated
from megalm.tools.kill_preprocess import kill_at_moments, outputs
from megalm.tools.preprocess import duplicates, merge, parts, program, report_files, store
from tests.tools.test_preprocess import json_lines, refused, run

REST = "; the same command does the rest"
PIECES = ("--tokenizer", "bytes", "--piece-bytes", "900")


@pytest.fixture
def text(tmp_path) -> str:
    return json_lines(tmp_path / "a.jsonl", [f"{i} " + "word " * (i % 50) for i in range(60)])


def stop_at(monkeypatch, module, name: str, count: int, how: BaseException | None = None) -> None:
    """Let a function end the program, as a kill would, or fail, at its call number `count`."""
    real, calls = getattr(module, name), []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            raise how or SystemExit(9)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, stop)


def test_killed_at_random_moments(tmp_path):
    assert kill_at_moments(tmp_path, moments=4, seed=1) >= 4


@pytest.mark.parametrize("module, name, first, step", [
    (os, "replace", 1, 1), (os, "fsync", 3, 7), (merge, "copy_bytes", 1, 3), (store.Work, "clear", 2, 1)])
def test_stopped_at_every_step(tmp_path, text, monkeypatch, capsys, module, name, first, step):
    """At each until the program ends by itself; the renames that publish the data set are among them."""
    monkeypatch.setattr(merge, "EVERY", 0)
    assert run("--input", text, "--output", tmp_path / "right", *PIECES) == 0
    for count in itertools.count(first, step):
        prefix = tmp_path / f"out{count}"
        with monkeypatch.context() as patch:
            patch.setattr(store.Work, "__exit__", lambda self, *_: os.close(self._lock))  # a killed process tidies nothing
            stop_at(patch, module, name, count)
            with contextlib.suppress(SystemExit):
                assert run("--input", text, "--output", prefix, *PIECES) == 0
                break
        left = outputs(prefix)
        assert all(now in (None, right) for now, right in zip(left, outputs(tmp_path / "right"), strict=True))
        assert run("--input", text, "--output", prefix, *PIECES) == 0
        assert outputs(prefix) == outputs(tmp_path / "right") and not Path(f"{prefix}.work").exists()
    assert outputs(prefix) == outputs(tmp_path / "right") and count > first
    capsys.readouterr()


@pytest.mark.parametrize("module, name, count, rest", [
    (program, "write_report", 1, REST), (store.Work, "clear", 2, REST), (program, "show_problems", 1, "")])
def test_stopped_when_the_data_set_is_written(tmp_path, text, monkeypatch, capsys, module, name, count, rest):
    command = ("--input", text, "--output", tmp_path / "out", *PIECES, "--quiet", "--report", tmp_path / "r.json")
    with monkeypatch.context() as patch:
        stop_at(patch, module, name, count, Terminated())
        assert run(*command) == 143
    assert capsys.readouterr().err == f"stopped by SIGTERM; the data set is written{rest}\n"
    before = outputs(tmp_path / "out")
    assert None not in before and run(*command, *([] if rest else ["--force"])) == 0
    assert outputs(tmp_path / "out") == before and (tmp_path / "r.json").exists() and not (tmp_path / "out.work").exists()


def test_files_that_lack_what_was_noted(tmp_path, text, monkeypatch, capsys):
    stopped(tmp_path, text, monkeypatch)
    os.truncate(tmp_path / "out.work" / "tokens", 10)
    err = refused(capsys, "--input", text, "--output", tmp_path / "out", *PIECES, "--quiet")
    assert "out.work/tokens has 10 bytes and should have " in err and "--restart begins anew" in err


def stopped(tmp_path, text, monkeypatch, *options) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(merge, "EVERY", 0)
        stop_at(patch, merge, "copy_bytes", 3)
        with pytest.raises(SystemExit):
            run("--input", text, "--output", tmp_path / "out", *PIECES, *options)
    assert (tmp_path / "out.work" / "run.json").exists()


def test_only_what_is_missing_is_done_again(tmp_path, text, monkeypatch, capsys):
    stopped(tmp_path, text, monkeypatch)
    work, made, real = tmp_path / "out.work", [], parts.PartWriter.finish
    done = len(list(work.glob("*.part"))) + json.loads((work / "state.json").read_text())["next"][0]
    monkeypatch.setattr(parts.PartWriter, "finish", lambda self, counts: (made.append(1), real(self, counts)))
    assert run("--input", text, "--output", tmp_path / "out", *PIECES) == 0
    size = Path(text).stat().st_size
    out, err = capsys.readouterr()
    assert done and len(made) + done == -(-size // 900)
    assert f"going on: {done * 900 / size:.0%} was done" in err and f"from {size / 1e6:.1f} MB" in out


def test_parts_from_before_a_power_cut_are_made_again(tmp_path, text, monkeypatch):
    """They were never brought to the disk: what is under their names may be anything."""
    assert run("--input", text, "--output", tmp_path / "right", *PIECES) == 0
    for count, how in enumerate((lambda path: monkeypatch.setattr(parts, "boot", lambda: "the next one"),
                                 lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\0" * 99))):
        prefix = tmp_path / f"out{count}"
        with monkeypatch.context() as patch:
            patch.setattr(merge.Merger, "add_all", lambda self: iter(()))
            stop_at(patch, parts.PartWriter, "finish", 3)
            with pytest.raises(SystemExit):
                run("--input", text, "--output", prefix, *PIECES)
        waiting = sorted(Path(f"{prefix}.work").glob("*.part"))
        assert len(waiting) == 2
        how(waiting[1])
        assert run("--input", text, "--output", prefix, *PIECES) == 0 and outputs(prefix) == outputs(tmp_path / "right")


def test_what_changed_is_named(tmp_path, text, monkeypatch, capsys):
    stopped(tmp_path, text, monkeypatch)
    before = sorted(path.name for path in (tmp_path / "out.work").iterdir())
    usual = ("--input", text, "--output", tmp_path / "out")
    other = json_lines(tmp_path / "b.jsonl", ["x"])
    for arguments, message in (
            ((*usual, *PIECES, "--field", "body"), 'options.field was "text" and is "body"'),
            ((*usual, *PIECES, "--no-append-eod"), "options.append_eod was true and is false"),
            (("--input", text, other, *usual[2:], *PIECES), "b.jsonl is new"),
            (("--input", other, *usual[2:], *PIECES), "a.jsonl is gone"),
            ((*usual, *PIECES[:2], "--piece-bytes", "901"), "piece_bytes was 900 and is 901"),
    ):
        err = refused(capsys, *arguments)
        assert message in err and "begin anew with --restart" in err
    with open(text, "a") as file:
        file.write('{"text": "more"}\n')
    assert "a.jsonl has changed" in refused(capsys, *usual, *PIECES)
    err = refused(capsys, *usual, *PIECES[:2])
    assert "a.jsonl has changed" in err and "piece_bytes" not in err
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == before
    assert run(*usual, *PIECES, "--restart") == 0


def test_the_pieces_are_those_that_were_begun(tmp_path, text, monkeypatch, capsys):
    """Where nobody says how large, neither what was said before nor what would be usual now is a change."""
    stopped(tmp_path, text, monkeypatch)
    assert run("--input", text, "--output", tmp_path / "out", *PIECES[:2]) == 0
    assert "going on" in capsys.readouterr().err


def test_without_advice_to_the_kernel(tmp_path, text, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
    assert run("--input", text, "--output", tmp_path / "out", *PIECES) == 0


def test_verify_and_versions_are_noted(tmp_path, text, monkeypatch, capsys):
    """What was not compared can't be called compared; the other way on, nothing is lost."""
    usual = ("--input", text, "--output", tmp_path / "out", *PIECES)
    stopped(tmp_path, text, monkeypatch)
    assert "verify was false and is true" in refused(capsys, *usual, "--verify")
    with monkeypatch.context() as patch:
        patch.setattr("megalm.__version__", "0.0.0")
        assert 'and is "0.0.0"' in refused(capsys, *usual)
    assert run(*usual, "--restart") == 0
    (tmp_path / "out.idx").unlink()
    stopped(tmp_path, text, monkeypatch, "--verify", "--force")
    assert run(*usual, "--force") == 0


def test_a_report_that_cannot_be_written(tmp_path, text, monkeypatch, capsys):
    usual = ("--input", text, "--output", tmp_path / "out", *PIECES, "--quiet", "--report")
    (tmp_path / "file").write_text("")
    for name, message in (("r.txt", "give a name that ends in .json"), ("out.data.json", "that is a file of the data set"),
                          ("file/r.json", "exists")):
        assert message in refused(capsys, *usual, tmp_path / name)
    with monkeypatch.context() as patch:
        stop_at(patch, report_files, "write_atomically", 2, OSError(errno.ENOSPC, "No space left on device"))
        err = refused(capsys, *usual, tmp_path / "r.json")
    assert "the data set is written, but not the report" in err and (tmp_path / "out.idx").exists()
    before = outputs(tmp_path / "out")
    assert run(*usual, tmp_path / "r.json") == 0
    assert (tmp_path / "r.txt").exists() and outputs(tmp_path / "out") == before and not (tmp_path / "out.work").exists()


def test_a_stricter_beginning_may_go_on_leniently(tmp_path, text, capsys):
    """An invalid line is met when much is done: --skip-invalid need not do that again."""
    with open(text, "a") as file:
        file.write("broken\n")
    usual = ("--input", text, "--output", tmp_path / "out", *PIECES)
    assert "line 61: not JSON" in refused(capsys, *usual)
    assert run(*usual, "--skip-invalid") == 0
    out, err = capsys.readouterr()
    assert "going on: " in err and "; 1 document left out: invalid" in out


def test_full_disk_in_the_middle(tmp_path, text, monkeypatch, capsys):
    assert run("--input", text, "--output", tmp_path / "right", *PIECES) == 0
    capsys.readouterr()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge, "copy_bytes", full)
        err = refused(capsys, "--input", text, "--output", tmp_path / "out", *PIECES)
    assert f"No space left on device; what is done is kept in {tmp_path}/out.work: the same command goes on" in err
    assert run("--input", text, "--output", tmp_path / "out", *PIECES) == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "right")


def from_pipe(path: Path, content: bytes, *arguments) -> int:
    """Run with a named pipe as the input."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    try:
        return run("--input", path, *arguments)
    finally:
        writer.join(30)


def test_a_pipe_is_stored_and_compared(tmp_path, text, monkeypatch, capsys):
    pipe, content, usual = tmp_path / "pipe", Path(text).read_bytes(), ("--output", tmp_path / "out", *PIECES)
    with monkeypatch.context() as patch:
        stop_at(patch, merge, "copy_bytes", 3)
        with pytest.raises(SystemExit):
            from_pipe(pipe, content, *usual)
    assert from_pipe(pipe, content[:-9], *usual) == 2
    assert f"{pipe} isn't what the run that is begun in {tmp_path}/out.work has read" in capsys.readouterr().err
    assert from_pipe(pipe, content, *usual) == 0 and "going on" in capsys.readouterr().err
    assert run("--input", text, "--output", tmp_path / "right", *PIECES) == 0
    assert outputs(tmp_path / "out")[:2] == outputs(tmp_path / "right")[:2]


TEXTS = [f"{i} {i % 7} " + "word " * (i % 11) for i in range(40)] * 2


@pytest.mark.parametrize("module, name", [(merge, "append"), (merge, "copy_bytes"), (duplicates, "append")])
def test_a_part_taken_in_by_half(tmp_path, monkeypatch, capsys, module, name):
    """The disk is full at each write in turn: what that part has left in files and counts is never noted as done."""
    command = ("--input", json_lines(tmp_path / "a.jsonl", TEXTS), *PIECES, "--deduplicate", "--near-duplicates", "0.9",
               "--force")
    assert run(*command, "--output", tmp_path / "right", "--report", tmp_path / "right.json") == 0
    for count in itertools.count(1):
        with monkeypatch.context() as patch:
            stop_at(patch, module, name, count, OSError(errno.ENOSPC, "No space left on device"))
            if run(*command, "--output", tmp_path / "out") == 0:
                break
        assert run(*command, "--output", tmp_path / "out", "--report", tmp_path / "out.json") == 0
        assert outputs(tmp_path / "out") == outputs(tmp_path / "right")
        assert (tmp_path / "out.json").read_bytes() == (tmp_path / "right.json").read_bytes()
    assert count > 1
    capsys.readouterr()


def test_two_at_once(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    with store.Work(str(tmp_path / "out")):
        assert "another process is writing it now" in refused(capsys, "--input", text, "--output", tmp_path / "out", *PIECES)


def test_the_lock_of_workers_that_are_ending_is_waited_for(tmp_path, text):
    """As after a SIGKILL of the program alone: they have inherited its lock."""
    folder = tmp_path / "out.work"
    folder.mkdir()
    inherited = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(inherited, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, (inherited,)).start()
    assert run("--input", text, "--output", tmp_path / "out", *PIECES) == 0


def test_a_new_run_is_not_removed_by_one_that_ends(tmp_path):
    """Behind a folder that is removed, another process may have begun."""
    with store.Work(str(tmp_path / "out")) as first:
        first.clear()
        with store.Work(str(tmp_path / "out")) as second:
            second.begin({})
            second.save({"merged": 0})
    assert (tmp_path / "out.work" / "run.json").exists()


def test_a_place_where_nothing_can_be_made_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a\n")
    assert run("--input", tmp_path / "a.txt", "--output", "/proc/x", "--tokenizer", "bytes") == 2
    assert capsys.readouterr().err == "error: /proc/x.work: No such file or directory\n"


def test_a_lock_that_was_removed_is_none(tmp_path, monkeypatch):
    """The folder goes between opening the lock and taking it."""
    def late(file, how):
        (tmp_path / "out.work" / "lock").unlink()

    monkeypatch.setattr(store.fcntl, "flock", late)
    with pytest.raises(DataError, match="another process finishes writing it"), store.Work(str(tmp_path / "out")):
        pass
