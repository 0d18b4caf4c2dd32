"""megalm data merge, split, shuffle: no document lost or doubled, all outputs or none, and every mistake as one line."""
from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalm.data import indexed, rewrite
from megalm.data.indexed import IndexedReader, IndexedWriter
from megalm.tools.data import __main__ as data
from tests.data.helpers import numbered, write

LENGTHS = [3, 0, 700, 1, 1, 25, 0, 4, 9000, 2]


def run(*arguments) -> int:
    return data.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def documents(prefix) -> list[list[int]]:
    """Every document's tokens."""
    reader = IndexedReader(prefix, multimodal=True)
    bounds = reader.document_indices.tolist()
    return [sum((reader.tokens(k).tolist() for k in range(low, high)), []) for low, high in zip(bounds, bounds[1:], strict=False)]


def both(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def sentences(prefix: Path, count: int = 40, seed: int = 0) -> Path:
    """Documents of none to four sequences, some of them empty: as for BERT."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(count):
            lengths = random.integers(0, 30, random.integers(0, 5)).tolist()
            writer.add_document(random.integers(0, 60_000, sum(lengths)), lengths)
    return prefix


def with_gaps(prefix: Path) -> list[list[int]]:
    """A data set whose .bin has unused bytes and sequences out of order; returns its documents."""
    write(prefix, [[9, 9], [1, 2, 3], [4, 5], [6]])
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    lengths, pointers = np.array([2, 3, 1], "<i4"), np.array([10, 4, 14], "<i8")  # [4, 5], [1, 2, 3], [6]
    raw = raw[:18] + (3).to_bytes(8, "little") + (4).to_bytes(8, "little")
    Path(f"{prefix}.idx").write_bytes(raw + lengths.tobytes() + pointers.tobytes() + np.arange(4, dtype="<i8").tobytes())
    return [[4, 5], [1, 2, 3], [6]]


# Merge

def test_merged_is_what_one_writer_writes(tmp_path, capsys):
    parts = [[[1, 2], [], [3]], [], [[4] * 5000, [5]]]
    for k, part in enumerate(parts):
        write(tmp_path / f"p{k}", part)
    write(tmp_path / "whole", sum(parts, []))
    assert run("merge", *(tmp_path / f"p{k}" for k in range(3)), "--output", tmp_path / "deep" / "all") == 0
    assert both(tmp_path / "deep" / "all") == both(tmp_path / "whole")
    assert "5 documents, 5,004 tokens (uint16) from 3 data sets" in capsys.readouterr().out


@pytest.mark.parametrize("begun", [0, 4])
@pytest.mark.parametrize("missing", [["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_where_the_kernel_cannot_copy(tmp_path, monkeypatch, begun, missing):
    """What one way has begun the next goes on with."""
    def fails(source, target, offset, count, real):
        if offset >= begun:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(source, target, offset, min(count, 4))

    for name in missing:
        real = rewrite.COPIES[name]
        monkeypatch.setitem(rewrite.COPIES, name, lambda *arguments, real=real: fails(*arguments, real))
    numbered(tmp_path / "a", LENGTHS)
    numbered(tmp_path / "b", [5, 6])
    assert run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c", "--quiet") == 0
    assert documents(tmp_path / "c") == documents(tmp_path / "a") + documents(tmp_path / "b")


def test_gaps_and_order_of_the_bin_are_not_copied(tmp_path):
    expected = with_gaps(tmp_path / "a")
    write(tmp_path / "b", [[7]])
    assert run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c") == 0
    write(tmp_path / "whole", [*expected, [7]])
    assert both(tmp_path / "c") == both(tmp_path / "whole")


def test_what_cannot_be_merged(tmp_path, capsys):
    a, b, c = write(tmp_path / "a", [[1]]), write(tmp_path / "b", [[1]], np.int32), write(tmp_path / "c", [[2]])
    before = names(tmp_path)
    out = ("--output", tmp_path / "out")
    assert "holds uint16 and" in (err := refused(capsys, "merge", a, b, *out)) and "int32" in err
    assert "is named 2 times: its documents would be doubled" in refused(capsys, "merge", a, c, a, *out)
    assert "is named 2 times" in refused(capsys, "merge", a, f"{tmp_path}/./a", *out)
    err = refused(capsys, "merge", a, tmp_path / "none", tmp_path / "no", *out)
    assert "no data set at" in err.split(";")[0] and "no data set at" in err.split(";")[1]
    assert "c is read and can't be written" in refused(capsys, "merge", a, c, "--output", c, "--overwrite")
    assert "c.bin exists already; it is replaced only with --overwrite" in refused(capsys, "merge", a, "--output", c)
    assert "required: COMMAND" in refused(capsys) and "invalid choice" in refused(capsys, "join")
    assert names(tmp_path) == before
    assert run("merge", a, "--output", c, "--overwrite") == 0 and documents(c) == [[1]]


def test_modes_are_kept_and_not_mixed(tmp_path, capsys):
    a, b = write(tmp_path / "a", [[1], [2, 3]]), write(tmp_path / "b", [[4]])
    with open(tmp_path / "a.idx", "ab") as file:
        file.write(bytes([0, 1]))
    assert "a is multimodal and" in refused(capsys, "merge", b, a, "--output", tmp_path / "c")
    assert run("shuffle", a, "--output", tmp_path / "s", "--seed", 3) == 0
    reader = IndexedReader(tmp_path / "s", multimodal=True)
    assert dict(zip(map(len, documents(tmp_path / "s")), reader.modes.tolist(), strict=True)) == {1: 0, 2: 1}


# Split

def test_random_split_is_exact_and_ordered(tmp_path):
    numbered(tmp_path / "a", [3] * 1000)
    assert run("split", tmp_path / "a", "--fractions", "0.98,0.015,0.005", "--seed", 7) == 0
    parts = [documents(tmp_path / f"a_{name}") for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [980, 15, 5]
    assert all(part == sorted(part) for part in parts)
    assert sorted(sum(parts, [])) == documents(tmp_path / "a")
    assert parts[2] != documents(tmp_path / "a")[-5:]
    first = [both(tmp_path / f"a_{name}") for name in ("train", "valid", "test")]
    assert run("split", tmp_path / "a", "--fractions", "0.98,0.015,0.005", "--seed", 7, "--output", tmp_path / "again") == 0
    assert [both(tmp_path / f"again_{name}") for name in ("train", "valid", "test")] == first
    assert run("split", tmp_path / "a", "--fractions", "0.98,0.015,0.005", "--output", tmp_path / "other", "--seed", 8) == 0
    assert both(tmp_path / "other_valid") != first[1]


def test_contiguous_split_by_counts(tmp_path):
    sentences(tmp_path / "a")
    usual = ("split", tmp_path / "a", "--contiguous", "--output", tmp_path / "out")
    assert run(*usual, "--documents", "7,rest", "--names", "x,y") == 0
    assert documents(tmp_path / "out_x") == documents(tmp_path / "a")[:7]
    assert documents(tmp_path / "out_y") == documents(tmp_path / "a")[7:]
    assert run("merge", tmp_path / "out_x", tmp_path / "out_y", "--output", tmp_path / "back") == 0
    assert both(tmp_path / "back") == both(tmp_path / "a")
    assert run(*usual, "--documents", "0,40", "--names", "none,all") == 0
    assert documents(tmp_path / "out_none") == [] and both(tmp_path / "out_all") == both(tmp_path / "a")


def test_fractions_that_do_not_divide(tmp_path):
    numbered(tmp_path / "a", [1] * 10)
    assert run("split", tmp_path / "a", "--fractions", "1/3,1/3,1/3") == 0
    assert [len(documents(tmp_path / f"a_{name}")) for name in ("train", "valid", "test")] == [4, 3, 3]


@pytest.mark.parametrize("fractions, expected", [
    ("1/2,1/2", ["train", "valid"]), ("1", ["train"]), ("1/4,1/4,1/4,1/4", ["part_0", "part_1", "part_2", "part_3"])])
def test_names_that_nobody_gave(tmp_path, fractions, expected):
    numbered(tmp_path / "a", [1] * 8)
    assert run("split", tmp_path / "a", "--fractions", fractions, "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.glob("out*.bin")) == [f"out_{name}.bin" for name in expected]


def test_splits_that_would_lose_something(tmp_path, capsys):
    numbered(tmp_path / "a", [1] * 10)
    before = names(tmp_path)
    for options, message in [
        (("--fractions", "0.9,0.05,0.04"), "the sum is 0.99 and must be 1, so that no document is lost"),
        (("--documents", "9,2,1"), "the sum is 12 documents and must be 10"),
        (("--documents", "9.5,0.5,0"), "a part of a document"),
        (("--documents", "rest,rest,1"), "at most one may be the word rest"),
        (("--documents", "a,1,2"), "numbers apart by commas"),
        (("--documents", "12,rest,0"), "the sum is 12 documents"),
        (("--fractions", "1.5,-0.5,0"), "at least 0"),
        (("--fractions", "0.5,0.5", "--names", "a"), "2 different names are needed"),
        (("--fractions", "rest,0,0", "--names", "a,a,b"), "3 different"),
        ((), "one of the arguments --fractions --documents is required"),
    ]:
        assert message in refused(capsys, "split", tmp_path / "a", *options)
    assert names(tmp_path) == before


# Shuffle

@pytest.mark.parametrize("make", [lambda prefix: numbered(prefix, LENGTHS * 30), sentences, with_gaps])
def test_shuffled(tmp_path, make, capsys):
    """Every document once, in an order of the seed's; in two passes by way of files the bytes are the same."""
    make(tmp_path / "a")
    size = len(Path(f"{tmp_path}/a.bin").read_bytes())
    for name, options in {"s": (), "same": ("--memory", -(-size // 5)), "other": ("--seed", 5)}.items():
        assert run("shuffle", tmp_path / "a", "--output", tmp_path / name, *options) == 0
    assert sorted(documents(tmp_path / "s")) == sorted(documents(tmp_path / "a"))
    assert both(tmp_path / "s") == both(tmp_path / "same")
    if make is not with_gaps:
        assert both(tmp_path / "other") != both(tmp_path / "s") != both(tmp_path / "a")
    assert names(tmp_path) == {f"{name}.{suffix}" for name in ("a", "s", "same", "other") for suffix in ("bin", "idx")}
    assert "shuffled with seed 1234" in capsys.readouterr().out


def test_order_depends_on_the_number_of_documents_alone(tmp_path):
    numbered(tmp_path / "a", [1] * 50)
    numbered(tmp_path / "b", [3] * 50)
    for name in "ab":
        assert run("shuffle", tmp_path / name, "--output", tmp_path / f"s{name}") == 0
    assert [d[0] for d in documents(tmp_path / "sa")] == [d[0] // 3 for d in documents(tmp_path / "sb")]


def test_sizes(tmp_path, capsys):
    numbered(tmp_path / "a", [1000] * 3)
    assert "not a size such as" in refused(capsys, "shuffle", tmp_path / "a", "--output", tmp_path / "b", "--memory", "4X")
    assert "at least 47 bytes" in refused(capsys, "shuffle", tmp_path / "a", "--output", tmp_path / "b", "--memory", "10")


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """Sixteen times the documents, 16,000 whose .idx alone has 320 KB, take as much memory but for 50 KB."""
    write(tmp_path / "empty", [])
    for module, name, value in ((rewrite, "DOCUMENTS", 500), (rewrite, "WRITE_BYTES", 2000), (indexed, "CHUNK", 500)):
        monkeypatch.setattr(module, name, value)
    peaks = {}
    for count in (1000, 16_000):
        with IndexedWriter(tmp_path / "a", np.uint16, overwrite=True) as writer:
            writer.append(np.zeros(3 * count, np.uint16), np.full(count, 3), np.ones(count, np.int64))
        for command in (("merge", tmp_path / "empty"), ("split", "--fractions", "0.5,0.3,0.2"), ("shuffle",)):
            tracemalloc.start()
            assert run(*command, tmp_path / "a", "--output", tmp_path / "out", "--overwrite", "--quiet") == 0
            peaks[command[0], count] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    for command in ("merge", "split", "shuffle"):
        assert peaks[command, 16_000] < peaks[command, 1000] + 50_000


# Nothing half-written

CALLS = [("merge", "a", "b", "--output", "out"), ("split", "a", "--fractions", "0.5,0.3,0.2", "--output", "out"),
         ("shuffle", "a", "--output", "out"), ("shuffle", "a", "--output", "out", "--memory", "100K")]


@pytest.mark.parametrize("call", CALLS, ids=["merge", "split", "shuffle", "shuffle_in_buckets"])
def test_full_disk(tmp_path, monkeypatch, call):
    """A real failure of a write, here of a file that may not grow beyond 150 KB: one line, and the old output is untouched."""
    monkeypatch.chdir(tmp_path)
    numbered(Path("a"), [1000] * 100)
    numbered(Path("b"), [1000] * 100, start=10**6)
    for name in ("out", "out_train", "out_valid", "out_test"):
        write(Path(name), [[7]], np.int32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "megalm.tools.data", *call, "--overwrite"], capture_output=True, text=True, timeout=60,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "File too large; nothing was written" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", CALLS, ids=["merge", "split", "shuffle", "shuffle_in_buckets"])
def test_ctrl_c(tmp_path, monkeypatch, capsys, call):
    monkeypatch.chdir(tmp_path)
    numbered(Path("a"), [1000] * 100)
    numbered(Path("b"), [1000] * 100)
    before = names(tmp_path)

    def interrupted(self, size):
        raise KeyboardInterrupt

    monkeypatch.setattr("megalm.tools._progress.Progress.add", interrupted)
    assert run(*call) == 130 and capsys.readouterr() == ("", "interrupted\n")
    assert names(tmp_path) == before


def test_all_parts_or_none(tmp_path, monkeypatch, capsys):
    """The disk is full when the last of three parts is synced: the other two don't appear either."""
    numbered(tmp_path / "a", [1] * 10)
    calls, real = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("megalm.data.publish.os.fsync", full)
    before = names(tmp_path)
    err = refused(capsys, "split", tmp_path / "a", "--fractions", "0.8,0.1,0.1")
    assert "No space left on device; nothing was written" in err
    assert names(tmp_path) == before
