"""megalm preprocess: what it writes, that workers don't matter, and every bad input as one line and exit code 2."""
from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader
from megalm.data.tokenizer import BytesTokenizer
from megalm.tools import preprocess
from megalm.tools.preprocess.job import Job, Worker
from megalm.tools.preprocess.pool import Pool, with_samples
from megalm.tools.preprocess.tasks import Task
from megalm.tools.preprocess.texts import Policy
from tests.data.models import make_huggingface, make_sentencepiece

PROGRAM = [sys.executable, "-m", "megalm.tools.preprocess"]


def json_lines(path: Path, texts, field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def run(*arguments) -> int:
    return preprocess.main([str(argument) for argument in arguments])


def read(prefix) -> list[list[int]]:
    reader = IndexedReader(prefix)
    return [reader.tokens(i).tolist() for i in range(len(reader))]


def refused(capsys, *arguments) -> str:
    """The error line of a call that must fail with exit code 2 and write nothing to stdout."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_documents_in_order_each_with_its_end(tmp_path, capsys):
    first, second = json_lines(tmp_path / "a.jsonl", ["ab", "é"]), tmp_path / "b.txt"
    second.write_text("one\nfile")
    assert run("--input", first, second, "--output", tmp_path / "deep" / "out", "--tokenizer", "bytes") == 0
    assert read(tmp_path / "deep" / "out") == [[97, 98, 256], [195, 169, 256], [*b"one\nfile", 256]]
    assert "3 documents, 15 tokens (uint16)" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out.bin", "out.idx", "out.data.json"}


def test_without_ends_and_another_field(tmp_path, capsys):
    path = json_lines(tmp_path / "a.jsonl", ["ab", "c"], field="body")
    usual = ("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert run(*usual, "--no-append-eod", "--field", "body", "--quiet") == 0
    assert read(tmp_path / "out") == [[97, 98], [99]]
    assert capsys.readouterr().out == ""


def test_empty_documents_keep_their_place(tmp_path, capsys):
    """As Megatron-LM has them: a document of no sequence, with no end of document."""
    path = json_lines(tmp_path / "a.jsonl", ["", "a", "", ""])
    assert run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes") == 0
    assert IndexedReader(tmp_path / "out").document_indices.tolist() == [0, 0, 1, 1, 1]
    assert "4 documents, 2 tokens (uint16), from" in (out := capsys.readouterr().out) and "3 empty documents" in out


def test_sentencepiece_and_huggingface(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", ["def f(x):\n", "naïve"])
    model, file = make_sentencepiece(tmp_path / "spm.model"), make_huggingface(tmp_path / "tokenizer.json")
    assert run("--input", path, "--output", tmp_path / "s", "--tokenizer", model) == 0
    assert [tokens[-1] for tokens in read(tmp_path / "s")] == [2, 2]
    assert run("--input", path, "--output", tmp_path / "h", "--tokenizer", file, "--eod", "<|endoftext|>") == 0
    assert [tokens[-1] for tokens in read(tmp_path / "h")] == [1000, 1000]


def test_large_vocabulary_takes_four_bytes(tmp_path):
    import tokenizers
    for size, dtype in ((65499, np.uint16), (65500, np.int32)):
        model = tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0")
        tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
        path = json_lines(tmp_path / "a.jsonl", [str(size - 1)])
        usual = ("--input", path, "--output", tmp_path / "out", "--tokenizer", tmp_path / "t.json")
        assert run(*usual, "--no-append-eod", "--force") == 0
        assert read(tmp_path / "out") == [[size - 1]] and IndexedReader(tmp_path / "out").dtype == dtype


def test_output_does_not_depend_on_workers_or_pieces(tmp_path, capsys):
    texts = ["word " * (i % 50) for i in range(100)]
    path = json_lines(tmp_path / "a.jsonl", texts)
    with open(path, "a") as file:
        file.write("broken\n" * 3)
    model = make_sentencepiece(tmp_path / "spm.model")
    for name, workers, piece in (("w1", 1, 1 << 20), ("w2", 2, 700), ("w3", 3, 1000), ("w4", 1, 1)):
        assert run("--input", path, "--output", tmp_path / name, "--tokenizer", model, "--workers", workers, "--skip-invalid",
                   "--piece-bytes", piece, "--check-documents", 0) == 0
    capsys.readouterr()
    for suffix in ("bin", "idx"):
        assert len({(tmp_path / f"w{i}.{suffix}").read_bytes() for i in (1, 2, 3, 4)}) == 1
    assert IndexedReader(tmp_path / "w1").num_documents == 100
    err = refused(capsys, "--input", path, "--output", tmp_path / "x", "--tokenizer", "bytes", "--workers", 2)
    assert "a.jsonl, line 101: not JSON" in err


class Poison:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_dies(tmp_path):
    job = Job(Policy("text"), "<u2", str(tmp_path), (), 1000)
    with pytest.raises(DataError, match="a worker process died"), Pool(Worker(job, BytesTokenizer()), [], 2) as pool:
        list(pool.make([Task(0, Poison())], False, False))


def test_the_process_that_looks_for_samples_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("megalm.tools.preprocess.pool.corpus_samples", lambda *_: os._exit(1))
    with pytest.raises(DataError, match="a worker process died"):
        with_samples(Job(Policy("text"), "<u2", str(tmp_path), (), 1000), BytesTokenizer(), [], 5, workers=2)


def test_the_process_that_looks_for_samples_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("what it says")

    monkeypatch.setattr("megalm.tools.preprocess.pool.corpus_samples", fail)
    with pytest.raises(ZeroDivisionError, match="what it says"):
        with_samples(Job(Policy("text"), "<u2", str(tmp_path), (), 1000), BytesTokenizer(), [], 5, workers=2)


def test_invalid_lines_are_counted_and_the_first_are_shown(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbroken\n{"text": "b"}\n{"txt": "c"}\n' + "x\n" * 20)
    assert run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--skip-invalid") == 0
    out, err = capsys.readouterr()
    assert read(tmp_path / "out") == [[97, 256], [98, 256]] and "; 22 documents left out: invalid" in out
    assert err.splitlines()[0].startswith("skipped: ") and "line 2: not JSON" in err and len(err.splitlines()) == 10


def bad_calls(folder: Path):
    good, model = json_lines(folder / "a.jsonl", ["a"]), str(make_huggingface(folder / "t.json"))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": 5}\n')
    (folder / "odd").write_text("")
    (folder / "nothing").mkdir()
    empty, out = json_lines(folder / "empty.jsonl", []), str(folder / "out")
    bad = f"{folder}/bad.jsonl"
    usual, hugging = ["--output", out, "--tokenizer", "bytes"], ["--output", out, "--tokenizer", model]
    return {
        "no arguments": ([], "the following arguments are required: --input, --output, --tokenizer"),
        "unknown option": (["--input", good, *usual, "--speed", "9"], "unrecognized arguments: --speed 9"),
        "missing input": (["--input", f"{folder}/none.jsonl", *usual], "none.jsonl is missing"),
        "folder": (["--input", f"{folder}/nothing", *usual], "is a folder without"),
        "glob": (["--input", f"{folder}/*.none", *usual], "*.none fits no file"),
        "twice": (["--input", good, f"{folder}/nothing/../a.jsonl", *usual], "is given twice"),
        "suffix": (["--input", f"{folder}/odd", *usual], "the suffix '' isn't known"),
        "less than no check": (["--input", good, *usual, "--check-documents", "-5"], "-5 is not a number of at least 0"),
        "no workers": (["--input", good, *usual, "--workers", "0"], "0 is not a number of at least 1"),
        "invalid line": (["--input", good, bad, *usual], "bad.jsonl, line 3: the field 'text' is a JSON number"),
        "no documents": (["--input", empty, *usual], "no text in"),
        "only empty documents": (["--input", json_lines(folder / "blank.jsonl", ["", ""]), *usual], "2 documents, all empty"),
        "missing tokenizer": (["--input", good, "--output", out, "--tokenizer", "none.model"], "tokenizer none.model is missing"),
        "ambiguous tokenizer": (["--input", good, "--output", out, "--tokenizer", "spm"], "say which with --tokenizer-type"),
        "no eod": (["--input", good, *hugging], "it has <|endoftext|>: name it with --eod"),
        "wrong eod": (["--input", good, *hugging, "--eod", "<endoftext>"], "the nearest is '<|endoftext|>'"),
        "eod for bytes": (["--input", good, *usual, "--eod", "x"], "bytes tokenizer has no token 'x'"),
        "output below a file": (["--input", good, "--output", f"{good}/x", "--tokenizer", "bytes"], "a.jsonl"),
    }


def test_bad_input(tmp_path, capsys):
    before = None
    for name, (arguments, message) in bad_calls(tmp_path).items():
        before = before or sorted(tmp_path.iterdir())
        assert message in refused(capsys, *arguments), name
        assert sorted(tmp_path.iterdir()) == before, name


def test_existing_output(tmp_path, capsys):
    path = json_lines(tmp_path / "a.jsonl", ["a"])
    usual = ("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert run(*usual) == 0
    capsys.readouterr()
    assert "out.bin exists already; it is replaced only with --force" in refused(capsys, *usual)
    json_lines(tmp_path / "a.jsonl", ["b"])
    assert run(*usual, "--force") == 0 and read(tmp_path / "out") == [[98, 256]]


def test_full_disk(tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = json_lines(tmp_path / "a.jsonl", ["a"])
    monkeypatch.setattr("megalm.data.publish.os.fsync", full)
    err = refused(capsys, "--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert "out: No space left on device; nothing was written" in err and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")])
@pytest.mark.parametrize("moment", ["starting", "working"])
def test_a_signal_with_workers_is_one_line(tmp_path, moment, number, word):
    """The terminal, or a scheduler, sends it to the workers too, at any moment; what is done is kept, and nothing of it under the
    final name."""
    json_lines(tmp_path / "a.jsonl", ["x" * 3000] * 20_000)
    command = [*PROGRAM, "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes",
               "--workers", "2", "--piece-bytes", "20000", "--quiet"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    work = tmp_path / "out.work"
    try:
        wait_for(lambda: len(children(process.pid)) >= 2 if moment == "starting" else list(work.glob("*.part")))
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (128 + number, "")
    assert err in (f"{word}; nothing was written\n", f"{word}; what is done is kept in {work}: the same command goes on\n")
    assert {path.name for path in tmp_path.iterdir()} - {"out.work"} == {"a.jsonl"}


def children(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
