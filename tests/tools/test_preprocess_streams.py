"""A compressed .jsonl is a row of parts: the bytes of the plain file, each part kept by itself, whoever reads it."""
from __future__ import annotations

import gzip
import hashlib
import json
import random
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from megalm.tools.kill_preprocess import outputs
from megalm.tools.preprocess import merge, parts, program
from megalm.tools.preprocess.inputs import find_source
from megalm.tools.preprocess.streams import TextStream
from tests.checkpoint.disks import mounted
from tests.tools.test_preprocess import PROGRAM, json_lines, refused, run
from tests.tools.test_preprocess_restart import stop_at

USUAL = ("--tokenizer", "bytes", "--quiet", "--piece-bytes", 900)
TEXTS = [f"{i} " + "word " * (i % 50) for i in range(60)] + ["long " * 1000, ""]


def gz(path: Path, plain: bytes) -> Path:
    """Several members, cut anywhere, and an empty one."""
    path.write_bytes(b"".join(gzip.compress(plain[low:low + 3000]) for low in range(0, len(plain) + 3000, 3000)))
    return path


def zst(path: Path, plain: bytes) -> Path:
    """Several frames, and one that is to be skipped (RFC 8878, 3.1.2)."""
    frames = [zstandard.ZstdCompressor().compress(plain[low:low + 3000]) for low in range(0, len(plain), 3000)]
    path.write_bytes(b"".join([frames[0], struct.pack("<II", 0x184D2A50, 5) + b"above", *frames[1:]]))
    return path


@pytest.fixture
def plain(tmp_path) -> Path:
    return Path(json_lines(tmp_path / "a.jsonl", TEXTS))


@pytest.fixture
def right(tmp_path, plain) -> list[bytes]:
    """The .bin and .idx of the plain file."""
    assert run("--input", plain, "--output", tmp_path / "right", *USUAL) == 0
    return outputs(tmp_path / "right")[:2]


@pytest.mark.parametrize("make", [gz, zst])
def test_pieces_end_with_lines_and_cover_the_text(tmp_path, make):
    draw = random.Random(3)
    content = b"\n".join(b"x" * draw.choice((0, 1, 30, 5000)) for _ in range(90))
    path = make(tmp_path / f"a.jsonl.{make.__name__}", content)
    for size in (1, 700, 4999, 1 << 20):
        found, first, taken = [], [], 0
        with TextStream(find_source(str(path)), size) as text:
            for _ in text.pieces():
                first.append(text.first)
                found.append(b"".join(iter(lambda: text.read(draw.choice((1, 50, 4000))), b"")))
                last, digest, count = text.end()
                taken += count
        edges = [*first, len(content)]
        assert all(piece == content[low:high] for piece, low, high in zip(found, edges, edges[1:], strict=False))
        assert all(content[low - 1:low] == b"\n" for low in first[1:]) and last and taken == path.stat().st_size
        assert all(content.find(b"\n", low + size - 1) + 1 in (0, high) for low, high in zip(edges, edges[1:], strict=False))
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        with TextStream(find_source(str(path)), size) as text:  # passed over, or read in part
            assert [(number % 2 and text.read(1), text.first)[1] for number in text.pieces()] == first


@pytest.mark.parametrize("make", [gz, zst])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_of_the_plain_file(tmp_path, plain, right, make, workers):
    path = make(tmp_path / f"b.jsonl.{make.__name__}", plain.read_bytes())
    assert run("--input", path, "--output", tmp_path / "out", *USUAL, "--workers", workers) == 0
    assert outputs(tmp_path / "out")[:2] == right
    source, = json.loads((tmp_path / "out.data.json").read_text())["sources"]
    assert source["hash"] == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_compressed_on_standard_input(tmp_path, plain, right, compress):
    command = [*PROGRAM, "--input", "-", "--output", str(tmp_path / "out"), *map(str, USUAL)]
    done = subprocess.run(command, input=compress(plain.read_bytes()), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"") and outputs(tmp_path / "out")[:2] == right


def test_several_files_and_a_small_one(tmp_path, plain, right):
    content = plain.read_bytes()
    cut = content.index(b"\n", len(content) // 2) + 1
    tiny = content.index(b"\n") + 1
    paths = [gz(tmp_path / "0.jsonl.gz", content[:tiny]), gz(tmp_path / "1.jsonl.gz", b""),
             gz(tmp_path / "2.jsonl.gz", content[tiny:cut]), zst(tmp_path / "3.jsonl.zst", content[cut:])]
    for workers in (1, 2):
        assert run("--input", *paths, "--output", tmp_path / "out", *USUAL, "--workers", workers, "--force") == 0
        assert outputs(tmp_path / "out")[:2] == right


def stopped(prefix: Path, path: Path, monkeypatch) -> None:
    """Five parts are there, of which three are taken in and noted."""
    with monkeypatch.context() as patch:
        patch.setattr(merge, "EVERY", 0)
        stop_at(patch, merge, "copy_bytes", 4)
        with pytest.raises(SystemExit):
            run("--input", path, "--output", prefix, *USUAL)
    with monkeypatch.context() as patch:
        patch.setattr(merge.Merger, "add_all", lambda self: iter(()))
        stop_at(patch, parts.PartWriter, "finish", 3)
        with pytest.raises(SystemExit):
            run("--input", path, "--output", prefix, *USUAL)
    assert json.loads(Path(f"{prefix}.work/state.json").read_text())["next"] == [0, 3]
    assert [part.name for part in sorted(Path(f"{prefix}.work").glob("*.part*"))] == [
        f"00000000-00000{number}.part" for number in (3, 4, 5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_run_makes_what_is_missing(tmp_path, plain, right, monkeypatch, workers):
    path, asked, real = gz(tmp_path / "b.jsonl.gz", plain.read_bytes()), [], program.remaining
    stopped(tmp_path / "out", path, monkeypatch)
    (tmp_path / "out.work" / "00000000-000004.part").unlink()

    monkeypatch.setattr(program, "remaining", lambda *all_of_it: (asked.append(task) or task for task in real(*all_of_it)))
    assert run("--input", path, "--output", tmp_path / "out", *USUAL, "--workers", workers) == 0
    assert outputs(tmp_path / "out")[:2] == right and not (tmp_path / "out.work").exists()
    assert asked[0].done == {0, 1, 2, 3, 5}
    if workers == 2:
        assert [task.piece.number for task in asked][:3] == [4, 6, 7]


def test_a_file_that_is_damaged_at_its_end(tmp_path, plain, right, capsys):
    """What is before stays done; nothing is published."""
    whole = gz(tmp_path / "b.jsonl.gz", plain.read_bytes()).read_bytes()
    for workers in (1, 2):
        (tmp_path / "b.jsonl.gz").write_bytes(whole[:-30])
        err = refused(capsys, "--input", tmp_path / "b.jsonl.gz", "--output", tmp_path / "out", *USUAL, "--workers", workers)
        assert "b.jsonl.gz: damaged .gz: " in err and not (tmp_path / "out.bin").exists()
        assert not list((tmp_path / "out.work").glob("*.partial"))
        (tmp_path / "b.jsonl.gz").write_bytes(whole)
        assert run("--input", tmp_path / "b.jsonl.gz", "--output", tmp_path / "out", *USUAL, "--restart", "--force") == 0
        assert outputs(tmp_path / "out")[:2] == right
        (tmp_path / "out.bin").unlink()
        (tmp_path / "out.idx").unlink()


def test_a_line_is_named_by_its_number(tmp_path, plain, capsys):
    path = gz(tmp_path / "b.jsonl.gz", plain.read_bytes() + b"broken\n")
    for workers in (1, 2):
        err = refused(capsys, "--input", path, "--output", tmp_path / "out", *USUAL, "--workers", workers, "--restart")
        assert f"b.jsonl.gz, line {len(TEXTS) + 1}: not JSON" in err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_full(tmp_path, workers, capsys):
    """A real one, wherever it happens: a line that says so, no half of anything, and with more room the same command goes on."""
    plain = Path(json_lines(tmp_path / "a.jsonl", [f"{i} " + "word " * 500 for i in range(300)]))
    assert run("--input", plain, "--output", tmp_path / "right", *USUAL[:3]) == 0
    path = gz(tmp_path / "b.jsonl.gz", plain.read_bytes())
    with mounted(tmp_path / "small", "1m") as folder:
        usual = ("--input", path, "--output", folder / "out", *USUAL[:3], "--piece-bytes", 90_000, "--workers", workers)
        err = refused(capsys, *usual)
        assert f"No space left on device; what is done is kept in {folder}/out.work: the same command goes on" in err
        assert [found.name for found in folder.iterdir()] == ["out.work"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        assert run(*usual) == 0
        assert outputs(folder / "out")[:2] == outputs(tmp_path / "right")[:2]
