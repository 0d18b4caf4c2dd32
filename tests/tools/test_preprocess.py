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

from megalm.data import documents
from megalm.data.documents import Batch
from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader
from megalm.data.tokenizer import TokenizerSource
from megalm.tools import preprocess
from tests.data.models import make_huggingface, make_sentencepiece

SCRIPT = Path(__file__).parents[2] / "tools" / "preprocess.py"


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
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out.bin", "out.idx"}


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


def test_output_does_not_depend_on_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 3)
    texts = ["word " * (i % 50) for i in range(100)]
    path = json_lines(tmp_path / "a.jsonl", texts)
    with open(path, "a") as file:
        file.write("broken\n" * 3)
    model = make_sentencepiece(tmp_path / "spm.model")
    for workers in (1, 2, 3):
        output = tmp_path / f"w{workers}"
        assert run("--input", path, "--output", output, "--tokenizer", model, "--workers", workers, "--skip-invalid") == 0
    capsys.readouterr()
    for suffix in ("bin", "idx"):
        whole = (tmp_path / f"w1.{suffix}").read_bytes()
        assert whole == (tmp_path / f"w2.{suffix}").read_bytes() == (tmp_path / f"w3.{suffix}").read_bytes()
    assert IndexedReader(tmp_path / "w1").num_documents == 100
    err = refused(capsys, "--input", path, "--output", tmp_path / "x", "--tokenizer", model, "--workers", 2)
    assert "a.jsonl, line 101: not JSON" in err


class Poison:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def work_on(field: str = "text"):
    return preprocess.Work(TokenizerSource("bytes"), field, True, np.dtype(np.uint16))


def test_few_batches_are_in_memory_at_once():
    taken = []

    def batches():
        for i in range(40):
            taken.append(i)
            yield Batch("a.jsonl", True, [b'{"text": "x"}'], [i])

    results = preprocess.encode_all(batches(), work_on(), workers=2)
    for given, _ in enumerate(results, start=1):
        assert len(taken) - given < 4
    assert given == 40


def test_a_worker_that_dies():
    with pytest.raises(DataError, match="a worker process died"):
        list(preprocess.encode_all(iter([Batch("a.jsonl", True, [Poison()], [1])]), work_on(), workers=2))


def test_invalid_lines_are_counted_and_the_first_are_shown(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbroken\n{"text": "b"}\n{"txt": "c"}\n' + "x\n" * 20)
    assert run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--skip-invalid") == 0
    out, err = capsys.readouterr()
    assert read(tmp_path / "out") == [[97, 256], [98, 256]] and "22 invalid documents skipped" in out
    assert err.splitlines()[0].startswith("skipped: ") and "line 2: not JSON" in err and len(err.splitlines()) == 10


def bad_calls(folder: Path):
    good, model = json_lines(folder / "a.jsonl", ["a"]), str(make_huggingface(folder / "t.json"))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": 5}\n')
    (folder / "odd").write_text("")
    empty, out = json_lines(folder / "empty.jsonl", []), str(folder / "out")
    bad = f"{folder}/bad.jsonl"
    usual, hugging = ["--output", out, "--tokenizer", "bytes"], ["--output", out, "--tokenizer", model]
    return {
        "no arguments": ([], "the following arguments are required: --input, --output, --tokenizer"),
        "unknown option": (["--input", good, *usual, "--speed", "9"], "unrecognized arguments: --speed 9"),
        "missing input": (["--input", f"{folder}/none.jsonl", *usual], "none.jsonl is missing"),
        "folder": (["--input", str(folder), *usual], "is a folder"),
        "suffix": (["--input", f"{folder}/odd", *usual], "the suffix '' isn't known"),
        "no workers": (["--input", good, *usual, "--workers", "0"], "--workers is 0"),
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


@pytest.mark.parametrize("moment", ["starting", "working"])
def test_ctrl_c_with_workers_is_one_word(tmp_path, moment):
    """The terminal sends it to the workers too, at any moment; nothing of the output stays."""
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    command = [sys.executable, str(SCRIPT), "--input", str(pipe), "--output", str(tmp_path / "out"), "--tokenizer", "bytes",
               "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with open(pipe, "wb") as writer:
            writer.write((b'{"text": "' + b"x" * 100_000 + b'"}\n') * 100)
            writer.flush()
            wait_for(lambda: len(children(process.pid)) >= 3 if moment == "starting" else (tmp_path / "out.bin.partial").exists())
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def children(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_middle(tmp_path):
    """The input is a pipe that stays open: when it is killed, the program has written some and waits. Then it goes through."""
    pipe, prefix = tmp_path / "a.jsonl", tmp_path / "out"
    os.mkfifo(pipe)
    command = [sys.executable, str(SCRIPT), "--input", str(pipe), "--output", str(prefix), "--tokenizer", "bytes"]
    process = subprocess.Popen(command)
    with open(pipe, "wb") as writer:
        writer.write(b'{"text": "' + b"x" * 3_000_000 + b'"}\n' * 2)
        writer.flush()
        partial, deadline = tmp_path / "out.bin.partial", time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert partial.stat().st_size > 0 and not list(tmp_path.glob("out.idx*")) and not (tmp_path / "out.bin").exists()
    pipe.unlink()
    json_lines(pipe, ["ab"])
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert read(prefix) == [[97, 98, 256]] and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out.bin", "out.idx"]
