"""Tokenizers of every kind on real text: determinism, what comes back, special tokens, digits, and the report."""
from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.data.tokenizer import TokenizerSource, load_tokenizer
from megalm.tools._corpus import PIECE, pieces
from megalm.tools.preprocess.backends import Reference, fast_backend
from megalm.tools.preprocess.checking import Sample, first_difference, strange_samples
from tests.data.models import TEXTS
from tests.data.real_text import KINDS, MALFORMED
from tests.tools.test_preprocess import run as preprocess
from tests.tools.test_preprocess_tokenizing import random_texts
from tests.tools.test_train_tokenizer import refused, run

EVERY_KIND = ["bpe", "unigram", "byte-bpe"]


def json_lines(path: Path, texts, **more) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """A file for each kind of text, with its name as `lang`: every text with 40 numbers."""
    folder = tmp_path_factory.mktemp("shards")
    return [json_lines(folder / f"{name}.jsonl", [f"{text} {number}" for text in texts for number in range(40)], lang=name)
            for name, texts in KINDS.items()]


def name_of(kind: str) -> str:
    return "a.json" if kind == "byte-bpe" else "a.model"


def loaded(path: Path, eod: str | None = None):
    return load_tokenizer(TokenizerSource("huggingface" if path.suffix == ".json" else "sentencepiece", str(path), eod))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_order_of_files_and_documents_does_not_matter(shards, tmp_path, kind, capsys):
    usual = ("--vocab-size", 560, "--type", kind, "--character-coverage", 0.98, "--sample-bytes", 40_000)
    assert run("--input", *shards, *usual, "--output", tmp_path / name_of(kind)) == 0
    lines = [line for shard in shards for line in shard.read_text().splitlines(keepends=True)]
    random.Random(1).shuffle(lines)
    (tmp_path / "x.jsonl").write_text("".join(lines[:300]))
    (tmp_path / "y.jsonl").write_text("".join(lines[300:]))
    other = tmp_path / "other" / name_of(kind)
    assert run("--input", tmp_path / "y.jsonl", tmp_path / "x.jsonl", *usual, "--output", other) == 0
    assert other.read_bytes() == (tmp_path / name_of(kind)).read_bytes()
    report, again = (json.loads((path / "a.report.json").read_text()) for path in (tmp_path, tmp_path / "other"))
    assert report.pop("inputs") != again.pop("inputs") and report == again
    assert run("--input", *shards, *usual, "--seed", 5, "--output", tmp_path / "seed" / name_of(kind)) == 0
    assert (tmp_path / "seed" / name_of(kind)).read_bytes() != other.read_bytes()


def test_other_threads_and_hash_seeds_give_the_same_bytes(shards, tmp_path):
    models = []
    for number, threads in enumerate(("1", "4")):
        output = tmp_path / f"{number}.json"
        command = [sys.executable, "-m", "megalm.tools.train_tokenizer", "--input", *map(str, shards), "--vocab-size", "800",
                   "--type", "byte-bpe", "--output", str(output), "--quiet"]
        environment = {**os.environ, "PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        models.append(output.read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_text_comes_back(shards, tmp_path, kind, capsys):
    """Held-out text of each kind, by name: all of it comes back from its ids, and the table says how long those are."""
    held = [f"{name}={json_lines(tmp_path / f'{name}.jsonl', texts)}" for name, texts in KINDS.items()]
    output = tmp_path / name_of(kind)
    assert run("--input", *shards, "--vocab-size", 560, "--type", kind, "--output", output, "--character-coverage", 0.98,
               "--held-out", *held) == 0
    report = json.loads((tmp_path / "a.report.json").read_text())
    tokenizer = loaded(output)
    for name, texts in KINDS.items():
        group = report["held_out"][name]
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        size = sum(len(text.encode()) for text in texts)
        assert (group["documents"], group["lossless"], group["bytes"], group["tokens"]) == (len(texts), len(texts), size, tokens)
        assert group["bytes_per_token"] == round(size / tokens, 4) > 1
    assert report["held_out_together"]["documents"] == sum(map(len, KINDS.values()))
    assert report["sample"]["documents"] == report["documents"] == 40 * sum(map(len, KINDS.values()))
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in (*KINDS, "together")) and "100.00%" in out
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS if "<" not in text)


def test_kept_back_by_language(shards, tmp_path, capsys):
    """A fifth of the corpus isn't trained on and is measured, under the names that its documents give."""
    assert run("--input", *shards, "--vocab-size", 700, "--type", "byte-bpe", "--output", tmp_path / "a.json",
               "--held-out-share", 0.2, "--language-field", "lang") == 0
    report = json.loads((tmp_path / "a.report.json").read_text())
    assert set(report["held_out"]) == set(KINDS)
    kept = report["held_out_together"]["documents"]
    assert kept + report["sample"]["of_documents"] == report["documents"] == 640
    assert abs(kept - 128) < 5 * (640 * 0.2 * 0.8) ** 0.5
    assert report["held_out"]["en"]["characters_per_token"] > report["held_out"]["zh"]["characters_per_token"]


def test_of_one_document_nothing_is_kept_back(tmp_path, capsys):
    for number in range(20):  # whichever of them the share would take
        path = tmp_path / f"{number}.txt"
        path.write_text(f"{number} one and the same text again, " * 30)
        assert run("--input", path, "--vocab-size", 270, "--type", "byte-bpe", "--output", tmp_path / f"{number}.json",
                   "--held-out-share", 0.5) == 0
        assert json.loads((tmp_path / f"{number}.report.json").read_text())["held_out"] == {}
    assert "no text was kept back" in capsys.readouterr().out


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_special_tokens(shards, tmp_path, kind):
    output, first = tmp_path / name_of(kind), 0 if kind == "byte-bpe" else 2
    assert run("--input", *shards, "--vocab-size", 560, "--type", kind, "--output", output, "--eod", "<|end|>",
               "--special-tokens", "<|user|>", "a,b \"c\"", "--quiet", "--character-coverage", 0.98) == 0
    tokenizer = loaded(output, "<|end|>")
    assert tokenizer.eod == first and loaded(output, "<|user|>").eod == first + 1 and loaded(output, "a,b \"c\"").eod == first + 2
    assert tokenizer.vocab_size == 560


@pytest.mark.parametrize("kind, digits, most", [("bpe", "single", 1), ("bpe", "keep", 4), ("unigram", "single", 1),
                                                ("byte-bpe", "single", 1), ("byte-bpe", "triples", 3), ("byte-bpe", "keep", 4)])
def test_digits(tmp_path, kind, digits, most):
    """The longest number that one token has, where the corpus is full of 2024."""
    path = json_lines(tmp_path / "a.jsonl", [f"in the year 2024 and 2024 {word}" for word in ("x", "y", "z")] * 50)
    output = tmp_path / name_of(kind)
    size = {"bpe": 285, "unigram": 275, "byte-bpe": 270}[kind]
    assert run("--input", path, "--vocab-size", size, "--type", kind, "--output", output, "--digits", digits, "--quiet") == 0
    tokenizer = loaded(output)
    shown = [tokenizer.decode([token]).strip() for token in tokenizer.encode("in the year 2024")]
    assert max(len(text) for text in shown if text.isdigit()) == most


@pytest.mark.parametrize("digits", ["single", "triples"])
def test_the_fast_tokenizer_takes_it(shards, tmp_path, digits):
    """With the ids of its own library, on real text and on what differs between tokenizers."""
    output = tmp_path / "a.json"
    assert run("--input", *shards, "--vocab-size", 900, "--type", "byte-bpe", "--output", output, "--digits", digits, "--quiet",
               "--special-tokens", "<|user|>") == 0
    tokenizer = load_tokenizer(TokenizerSource("huggingface", str(output), "<|endoftext|>", special_tokens=False))
    fast, why = fast_backend(tokenizer)
    assert fast is not None, why
    samples = [Sample(text) for text in (*TEXTS, *random_texts(300, 5))] + strange_samples(tokenizer)
    assert first_difference(samples, fast, Reference(tokenizer)) is None


def test_one_that_it_does_not_take_is_named_in_a_line(shards, tmp_path, capsys):
    usual = ("--input", shards[0], "--output")
    assert run(*usual, tmp_path / "a.json", "--vocab-size", 400, "--type", "byte-bpe", "--digits", "keep", "--quiet") == 0
    assert preprocess(*usual, tmp_path / "out", "--tokenizer", tmp_path / "a.json", "--eod", "<|endoftext|>") == 0
    err = capsys.readouterr().err
    assert "tokenizing at huggingface's own speed: gigatoken can't take this model: " in err and err.count("\n") == 1
    assert len(err) < 260 and ".rs" not in err


def test_without_byte_fallback_unknown_characters_are_lost(shards, tmp_path):
    held = json_lines(tmp_path / "held.jsonl", ["ৎ", "the harbour"])
    output = tmp_path / "a.model"
    assert run("--input", *shards, "--vocab-size", 600, "--output", output, "--no-byte-fallback", "--quiet",
               "--character-coverage", 0.98, "--held-out", f"x={held}") == 0
    assert json.loads((tmp_path / "a.report.json").read_text())["held_out"]["x"]["lossless"] == 1


def test_every_kind_of_file_gives_the_same_model(shards, tmp_path):
    """All texts as plain, gzipped, zstandard and parquet shards, by a folder, a glob or a name."""
    import pyarrow.parquet
    import zstandard
    lines = b"".join(shard.read_bytes() for shard in shards)
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    models = set()
    for number, inputs in enumerate([shards, [tmp_path / "folder"], [f"{tmp_path}/*.zst"], [tmp_path / "a.parquet"]]):
        output = tmp_path / f"{number}.json"
        assert run("--input", *inputs, "--vocab-size", 700, "--type", "byte-bpe", "--output", output, "--quiet") == 0
        models.add(output.read_bytes())
    assert len(models) == 1


def test_malformed_text_by_policy(tmp_path, capsys):
    """gzipped, by a glob: of four documents that aren't UTF-8 and a hundred that are."""
    good = [json.dumps({"text": f"a good text {number}"}).encode() for number in range(100)]
    bad = [b'{"text": "' + raw + b'"}' for raw in MALFORMED]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(good + bad)))
    usual = ("--input", f"{tmp_path}/*.jsonl.gz", "--vocab-size", 262, "--type", "byte-bpe", "--held-out-share", 0)
    err = refused(capsys, *usual, "--output", tmp_path / "x.json")
    assert "a.jsonl.gz, line 101: not UTF-8" in err
    for policy, taken, left in (("replace", 104, 0), ("drop", 100, 4)):
        assert run(*usual, "--output", tmp_path / f"{policy}.json", "--encoding-errors", policy) == 0
        report = json.loads((tmp_path / f"{policy}.report.json").read_text())
        assert (report["documents"], report["invalid_documents"]) == (taken, left)


def test_long_documents_take_part_in_pieces():
    text = ("x" * 99 + "\n") * (PIECE // 40)
    parts = list(pieces(text))
    assert "".join(parts) == text and len(parts) == 3 and all(part.endswith("\n") and len(part) <= PIECE for part in parts)
    assert [len(part) for part in pieces("é" * (2 * PIECE + 5))] == [PIECE, PIECE, 5] and list(pieces("")) == [""]


def test_mistakes(shards, tmp_path, capsys):
    usual = ("--input", shards[0], "--vocab-size", 700, "--output", tmp_path / "a.json", "--type", "byte-bpe")
    for options, message in [
        (("--type", "bpe"), "--type bpe makes a *.model; --type byte-bpe makes a *.json"),
        (("--output", tmp_path / "a.model"), "--type byte-bpe makes a *.json; --type bpe or unigram makes a *.model"),
        (("--vocab-size", 257), "257 special and byte pieces alone need more"), (("--vocab-size", 90_000), "gives at most"),
        (("--held-out", "en"), "NAME=FILE is wanted"), (("--held-out", f"en={tmp_path}/none.jsonl"), "none.jsonl is missing"),
        (("--held-out-share", 1), "below 1"), (("--character-coverage", 0.97), "it must be from 0.98 to 1"),
        (("--special-tokens", "a", "a"), "'a' is named twice"), (("--special-tokens", ""), "'' is empty"),
        (("--sample-documents", 0), "0 is not a number of at least 1"), (("--digits", "pairs"), "invalid choice"),
        (("--type", "bpe", "--output", tmp_path / "a.model", "--digits", "triples"), "--type byte-bpe can"),
        (("--type", "bpe", "--output", tmp_path / "a.model", "--special-tokens", "<s>"), "<s> is a piece of every"),
    ]:
        assert message in refused(capsys, *usual, *options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.report.json").write_text("{}")
    assert "a.report.json exists already" in refused(capsys, *usual)
