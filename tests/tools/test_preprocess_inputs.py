"""What is read: every kind of file, cut at any byte; damaged files; text that isn't UTF-8; one document that is large."""
from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.data.errors import DataError
from megalm.tools.preprocess import inputs, reading
from megalm.tools.preprocess.inputs import Span, find_source, find_sources, make_units
from megalm.tools.preprocess.reading import BLOCK, begin_before, read_chunks, whole_lines
from tests.data.models import make_sentencepiece
from tests.tools.test_preprocess import PROGRAM, json_lines, read, refused, run
from tests.tools.test_preprocess_cleaning import texts

TEXTS = ["one", "zwei", "", "四\n4", "five " * 50]
USUAL = ("--tokenizer", "bytes", "--quiet", "--force")


def parquet(path: Path, values, kind="string", groups: int = 2) -> str:
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"id": list(range(len(values))), "text": pyarrow.array(values, getattr(pyarrow, kind)())})
    pyarrow.parquet.write_table(table, path, row_group_size=groups)
    return str(path)


def compressed(path: Path, plain: bytes) -> str:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain))
    else:
        import zstandard
        half = len(plain) // 2
        frames = (zstandard.ZstdCompressor().compress(part) for part in (plain[:half], plain[half:]))
        path.write_bytes(b"".join(frames))
    return str(path)


def test_every_kind_gives_the_same(tmp_path):
    plain = Path(json_lines(tmp_path / "a.jsonl", TEXTS)).read_bytes()
    inputs = [tmp_path / "a.jsonl", compressed(tmp_path / "b.jsonl.gz", plain), compressed(tmp_path / "c.jsonl.zst", plain),
              parquet(tmp_path / "d.parquet", TEXTS),
              parquet(tmp_path / "e.parquet", [text.encode() for text in TEXTS], "large_binary")]
    for path in inputs:
        assert run("--input", path, "--output", tmp_path / "out", *USUAL, "--piece-bytes", 40) == 0
        assert texts(tmp_path / "out") == TEXTS, path
    (tmp_path / "f.txt").write_text("all\nof it")
    more = compressed(tmp_path / "g.txt.zst", b"more")
    assert run("--input", tmp_path / "f.txt", more, "--output", tmp_path / "out", *USUAL) == 0
    assert texts(tmp_path / "out") == ["all\nof it", "more"]


def test_what_is_no_corpus_in_a_folder(tmp_path):
    """The same command, again and again, with its output and its report in the folder that it reads."""
    json_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "other.work").mkdir()
    json_lines(tmp_path / "other.work" / "stream-0.jsonl", ["no"])
    for name in (tmp_path, tmp_path, tmp_path / "[a-o]*"):
        assert run("--input", name, "--output", tmp_path / "out", *USUAL, "--report", tmp_path / "r.json") == 0
        assert texts(tmp_path / "out") == TEXTS
    json_lines(tmp_path / "named.json", ["yes"])
    assert run("--input", tmp_path / "named.json", "--output", tmp_path / "out", *USUAL) == 0
    assert texts(tmp_path / "out") == ["yes"]


def test_many_bad_lines_are_counted_once(tmp_path, monkeypatch, capsys):
    path, opened = tmp_path / "a.jsonl", []
    path.write_text("x\n" * 300 + '{"text": "good"}\n')
    real = reading.open_stream
    monkeypatch.setattr(reading, "open_stream", lambda *names: (opened.append(1), real(*names))[1])
    assert run("--input", path, "--output", tmp_path / "out", *USUAL, "--skip-invalid") == 0
    assert texts(tmp_path / "out") == ["good"] and len(opened) == 2
    assert "a.jsonl, line 10: not JSON" in capsys.readouterr().err


def test_zstd_of_the_largest_window(tmp_path):
    """As zstd --long=31 writes it; without the size of the content, which would make the window smaller."""
    import zstandard
    plain = Path(json_lines(tmp_path / "a.jsonl", TEXTS)).read_bytes()
    wide = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, hash_log=8, chain_log=8, strategy=1)
    maker = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "b.jsonl.zst").write_bytes(maker.compress(plain) + maker.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + maker.flush())
    assert zstandard.get_frame_parameters((tmp_path / "b.jsonl.zst").read_bytes()).window_size == 1 << 31
    assert run("--input", tmp_path / "b.jsonl.zst", "--output", tmp_path / "out", *USUAL) == 0
    assert texts(tmp_path / "out") == TEXTS


def test_folders_globs_and_their_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        json_lines(folder / name, [name])
    (folder / "notes.md").write_text("left alone")
    assert run("--input", folder, "--output", tmp_path / "out", *USUAL) == 0
    assert texts(tmp_path / "out") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert run("--input", f"{folder}/[b]*.jsonl", f"{folder}/deep", "--output", tmp_path / "out", *USUAL) == 0
    assert texts(tmp_path / "out") == ["b.jsonl", "deep/c.jsonl"]


@pytest.mark.parametrize("name", ["-", "pipe"])
def test_standard_input_and_pipes(tmp_path, name):
    lines = json_lines(tmp_path / "a.jsonl", TEXTS)
    reference = f"cat {lines} | " if name == "-" else ""
    given = "-" if name == "-" else f"<(cat {lines})"
    command = f"{reference}{' '.join(PROGRAM)} --input {given} --output {tmp_path}/out --tokenizer bytes --quiet"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and texts(tmp_path / "out") == TEXTS
    assert json.loads((tmp_path / "out.data.json").read_text())["sources"][0]["name"] in ("standard input", f"/dev/fd/{63}")


@pytest.mark.parametrize("end", [b"\n", b""])
def test_cut_at_every_byte_each_line_is_read_once(end):
    content = b"\n".join([b"a", b"", b"bcd", b"e" * 7, b"\xff\r"]) + end
    expected = content.split(b"\n")[:-1] if end else content.split(b"\n")
    for cut in range(1, len(content)):
        found = [line for low, high in ((0, cut), (cut, len(content)))
                 for _, lines in whole_lines(io.BytesIO(content), low, high) for line in lines]
        assert found == expected, cut


def test_lines_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("megalm.tools.preprocess.reading.BLOCK", 7)
    draw = random.Random(0)
    lines = [b"x" * draw.randint(0, 40) for _ in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    source, size = find_source(str(path)), path.stat().st_size
    for step in (1, 13, 50, size):
        found, offsets = [], []
        for low in range(0, size, step):
            for chunk in read_chunks(source, Span(0, low, min(size, low + step), 0), "text"):
                offsets.append((chunk.first, len(found)))
                found += chunk.raw
        assert found == lines
        assert all(first == sum(len(line) + 1 for line in lines[:count]) for first, count in offsets)


def test_parquet_in_two_processes(tmp_path):
    """Forked when pyarrow is loaded: by the check's sampling as well as for the parts."""
    path = parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(40)])
    model = make_sentencepiece(tmp_path / "spm.model")
    for workers in (1, 2):
        command = [*PROGRAM, "--input", path, "--output", f"{tmp_path}/out{workers}", "--tokenizer", str(model), "--quiet",
                   "--workers", str(workers), "--piece-bytes", "300"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    for suffix in ("bin", "idx", "data.json"):
        assert (tmp_path / f"out1.{suffix}").read_bytes() == (tmp_path / f"out2.{suffix}").read_bytes()
    assert len(read(tmp_path / "out2")) == 40


def test_lines_before_an_offset():
    assert begin_before([b"ab", b"c", b""], 3) == [b"ab"] and begin_before([b"ab", b"c", b""], 4) == [b"ab", b"c"]


def test_the_usual_piece_is_small_beside_the_whole():
    """And never so small or so many that the pieces themselves cost something."""
    from megalm.tools.preprocess.inputs import Source, usual_piece
    sizes = (0, 1 << 30, 8 << 30, 1 << 44)
    found = [usual_piece([Source("a.jsonl", "jsonl", None, size // 2, 0)] * 2) >> 20 for size in sizes]
    assert found == [16, 16, 32, 64]


def test_the_hash_of_a_file_does_not_depend_on_how_it_is_cut(tmp_path, monkeypatch):
    """Nor on what else is read: the file's own, or up to a size that of the hashes of its blocks."""
    monkeypatch.setattr(inputs, "HASHED", 1000)
    long, short = (json_lines(tmp_path / f"{name}.jsonl", ["word " * 9] * count) for name, count in (("long", 50), ("short", 15)))
    exact, content = tmp_path / "exact.jsonl", Path(long).read_bytes()
    exact.write_bytes(content[:999].rsplit(b"\n", 1)[0].ljust(2000))
    blocks = b"".join(hashlib.sha256(content[low:low + 1000]).digest() for low in range(0, len(content), 1000))
    runs = (300, (long,)), (1000, (short, long)), (1001, (long, exact)), (1 << 20, (long, short)), (2000, (exact, long))
    for number, (piece, names) in enumerate(runs):
        assert run("--input", *names, "--output", tmp_path / f"out{number}", "--tokenizer", "bytes", "--piece-bytes", piece,
                   "--skip-invalid") == 0
        found = json.loads((tmp_path / f"out{number}.data.json").read_text())["sources"]
        hashes = {source["name"]: source["hash"] for source in found}
        assert hashes[long] == f"sha256-of-1000-byte-pieces:{hashlib.sha256(blocks).hexdigest()}" and len(hashes) == len(names)
        if short in names:
            assert hashes[short] == f"sha256:{hashlib.sha256(Path(short).read_bytes()).hexdigest()}"
    twice = b"".join(hashlib.sha256(exact.read_bytes()[low:low + 1000]).digest() for low in (0, 1000))
    assert hashes[str(exact)] == f"sha256-of-1000-byte-pieces:{hashlib.sha256(twice).hexdigest()}"


def test_units_cover_everything_once(tmp_path):
    paths = [json_lines(tmp_path / f"{i}.jsonl", ["x" * i * 10] * 3) for i in range(6)]
    sources = find_sources(paths, None)
    for size in (1, 50, 100, 1 << 20):
        units = make_units(sources, size)
        spans = [span for unit in units for span in unit]
        assert [(s.source, s.start) for s in spans] == sorted((s.source, s.start) for s in spans)
        assert sum(s.end - s.start for s in spans) == sum(source.size for source in sources)
        assert all(len(unit) == 1 or sum(span.weight for span in unit) <= size for unit in units)


def broken(folder: Path):
    plain = Path(json_lines(folder / "a.jsonl", ["text " * 1000] * 3)).read_bytes()
    gz, zst = (Path(compressed(folder / f"b.jsonl.{suffix}", plain)) for suffix in ("gz", "zst"))
    for path in (gz, zst):
        path.write_bytes(path.read_bytes()[:-20])
    (folder / "c.jsonl.zst").write_bytes(b"not zstd at all")
    (folder / "d.jsonl.gz").write_bytes(b"not gzip at all")
    (folder / "e.parquet").write_bytes(b"PAR1")
    (folder / "f.parquet.gz").write_bytes(b"")
    return [(gz, "damaged .gz"), (zst, "damaged .zst: it is cut short"), (folder / "c.jsonl.zst", "damaged .zst"),
            (folder / "d.jsonl.gz", "damaged .gz"), (folder / "e.parquet", "can't be read as parquet"),
            (folder / "f.parquet.gz", "compressed inside"),
            (parquet(folder / "g.parquet", [1, 2], "int64"), "of type int64 and not of"),
            (parquet(folder / "h.parquet", ["a", None]), "h.parquet, row 2: null and not a string")]


def test_damaged_files(tmp_path, capsys):
    for path, message in broken(tmp_path):
        assert message in refused(capsys, "--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes"), path
        assert not list(tmp_path.glob("out*"))
    good = parquet(tmp_path / "i.parquet", ["a"])
    usual = ("--input", good, "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert "no column 'body'; it has 'id', 'text'" in refused(capsys, *usual, "--field", "body")


MALFORMED = [b'{"text": "good"}', b'{"text": "bad \xff\xe4\xbd byte"}', b'{"text": "half \\ud83d pair"}',
             b'{"text": "\\ud83d\\ude00"}',
             b'{"text": "nan", "x": NaN}', b"", b'\xef\xbb\xbf{"text": "mark"}', b'{"text": "\xed\xa0\x80"}']


def test_malformed_text(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(MALFORMED))
    usual = ("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--force")
    assert "line 2: not UTF-8 at byte 14 of the line; --encoding-errors replace or drop goes on" in refused(capsys, *usual)
    assert run(*usual, "--encoding-errors", "replace") == 0
    # U+FFFD for each maximal part of a sequence: Unicode 16, chapter 3.9, table 3-8
    assert texts(tmp_path / "out") == ["good", "bad \ufffd\ufffd byte", "half \ufffd pair", "😀", "nan", "mark",
                                       "\ufffd\ufffd\ufffd"]
    out, err = capsys.readouterr()
    assert "replaced in 3 documents" in out and err.count("mended: ") == 3 and "skipped" not in err
    assert run(*usual, "--encoding-errors", "drop") == 0
    assert texts(tmp_path / "out") == ["good", "😀", "nan", "mark"]
    out, err = capsys.readouterr()
    assert out.count("UTF-8") == 1 and "; 3 documents left out: not UTF-8" in out
    assert err.count("skipped: ") == 3 and "line 3: half a surrogate pair" in err
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf\xff x")
    assert run("--input", tmp_path / "b.txt", *usual[2:], "--encoding-errors", "replace") == 0
    assert texts(tmp_path / "out") == ["\ufffd x"]


def test_an_input_that_changes_meanwhile(tmp_path, monkeypatch, capsys):
    path = json_lines(tmp_path / "a.jsonl", ["a"] * 10)
    source = find_source(path)
    with open(path, "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="a.jsonl changed while it was read"):
        source.check()


def test_a_large_document(tmp_path):
    """Thirty times the size of a block; tools/bench_corpus.py --document-bytes takes one of 1 GB."""
    text = "0123456789 häß" * (2 * BLOCK)
    path = json_lines(tmp_path / "a.jsonl", ["before", text, "after"])
    assert run("--input", path, "--output", tmp_path / "out", *USUAL, "--workers", 2, "--piece-bytes", BLOCK) == 0
    assert [len(tokens) for tokens in read(tmp_path / "out")] == [7, len(text.encode()) + 1, 6]


def test_help_imports_nothing_slow():
    code = ("import sys; from megalm.cli import main; main(['preprocess', '--help']); "
            "print(sorted({'numpy', 'torch', 'orjson'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
