"""megalm train-tokenizer: deterministic, lossless, and plain about what it can't do."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megalm.data.tokenizer import TokenizerSource, load_tokenizer
from megalm.tools import train_tokenizer
from megalm.tools._trainers import MAX_SENTENCE, sentences
from tests.data.models import TEXTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """150 documents: a module of the standard library in pieces of ten lines."""
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    lines = Path(argparse.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    documents = ["".join(lines[start:start + 10]) for start in range(0, 1500, 10)]
    path.write_text("".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in documents))
    return path


def run(*arguments) -> int:
    return train_tokenizer.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_bytes(corpus, tmp_path, capsys, kind):
    assert run("--input", corpus, "--vocab-size", 600, "--output", tmp_path / "a.model", "--type", kind) == 0
    assert run("--input", corpus, "--vocab-size", 600, "--model-prefix", tmp_path / "deep" / "b", "--type", kind) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "deep" / "b.model").read_bytes()
    assert f"a.model: 600 pieces ({kind}) from " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_texts_come_back(corpus, tmp_path, kind):
    assert run("--input", corpus, "--vocab-size", 600, "--output", tmp_path / "a.model", "--type", kind) == 0
    tokenizer = load_tokenizer(TokenizerSource("sentencepiece", str(tmp_path / "a.model")))
    assert tokenizer.vocab_size == 600 and tokenizer.eod == 2
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert len(tokenizer.encode("return argument help")) < 10  # it learned words
    assert len(tokenizer.encode("12345")) >= 5  # digits one by one


def test_field_and_plain_text(corpus, tmp_path):
    assert run("--input", corpus, "--vocab-size", 600, "--output", tmp_path / "upper.model", "--field", "body") == 0
    upper = load_tokenizer(TokenizerSource("sentencepiece", str(tmp_path / "upper.model")))
    assert len(upper.encode("RETURN ARGUMENT")) < len(upper.encode("return argument"))
    (tmp_path / "a.txt").write_text(Path(argparse.__file__).read_text(encoding="utf-8"))
    assert run("--input", tmp_path / "a.txt", "--vocab-size", 600, "--output", tmp_path / "plain.model") == 0


def test_a_part_of_a_large_corpus(corpus, tmp_path, capsys):
    """Just as many documents as have so many bytes; --max-bytes is the older name of --sample-bytes."""
    usual = ("--input", corpus, "--vocab-size", 500, "--held-out-share", 0)
    for option in ("--sample-bytes", "--max-bytes"):
        output = tmp_path / f"{option}.model"
        assert run(*usual, "--output", output, option, 20_000) == 0
        sample = json.loads(output.with_suffix(".report.json").read_text())["sample"]
        assert 20_000 <= sample["bytes"] < 21_000 and sample["of_documents"] == 150
        assert f"{sample['documents']} of 150 documents" in capsys.readouterr().out
    assert run(*usual, "--output", tmp_path / "b.model", "--sample-documents", 60) == 0
    assert json.loads((tmp_path / "b.report.json").read_text())["sample"]["documents"] == 60


def test_sentences_fit_the_trainer():
    text = "short\n" + "😀" * 5000 + "\n\nend"
    parts = list(sentences(text))
    assert max(len(part.encode()) for part in parts) <= MAX_SENTENCE
    assert parts[0] == "short" and "".join(parts[1:-1]) == "😀" * 5000 and parts[-1] == "end"


def test_vocabulary_sizes_that_cannot_be(corpus, tmp_path, capsys):
    output = ("--output", tmp_path / "a.model")
    assert "100000 is too large for this corpus, which gives at most" in refused(
        capsys, "--input", corpus, "--vocab-size", 100_000, *output, "--type", "unigram")
    assert "100000 is too large for this corpus" in refused(capsys, "--input", corpus, "--vocab-size", 100_000, *output)
    assert "270 is too small for this corpus: its characters" in refused(capsys, "--input", corpus, "--vocab-size", 270, *output)
    assert "259 special and byte pieces alone need more" in refused(capsys, "--input", corpus, "--vocab-size", 259, *output)
    assert list(tmp_path.iterdir()) == []


def test_the_size_it_names_is_possible(corpus, tmp_path, capsys):
    err = refused(capsys, "--input", corpus, "--vocab-size", 100_000, "--output", tmp_path / "a.model")
    most = int(err.split("at most ")[1].split()[0])
    assert run("--input", corpus, "--vocab-size", most, "--output", tmp_path / "a.model") == 0


def test_bad_input(corpus, tmp_path, capsys):
    usual = ("--vocab-size", 600, "--output", tmp_path / "a.model")
    (tmp_path / "bad.jsonl").write_text(corpus.read_text() + "broken\n")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert "is missing" in refused(capsys, "--input", tmp_path / "none.jsonl", *usual)
    assert "bad.jsonl, line 151: not JSON" in refused(capsys, "--input", tmp_path / "bad.jsonl", *usual)
    assert "no text in" in refused(capsys, "--input", tmp_path / "empty.jsonl", *usual)
    assert "no field 'no'" in refused(capsys, "--input", corpus, *usual, "--field", "no")
    assert "--type bpe makes a *.model" in refused(capsys, "--input", corpus, "--vocab-size", 600, "--output", tmp_path / "a.bin")
    assert "invalid choice" in refused(capsys, "--input", corpus, *usual, "--type", "word")
    assert "--sample-bytes is 0" in refused(capsys, "--input", corpus, *usual, "--max-bytes", 0)
    assert run("--input", tmp_path / "bad.jsonl", *usual, "--skip-invalid") == 0
    assert "1 invalid document skipped" in capsys.readouterr().out
    assert "exists already" in refused(capsys, "--input", corpus, *usual)
    assert run("--input", corpus, *usual, "--force") == 0
