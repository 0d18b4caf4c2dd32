"""megalm data inspect: numbers as numpy has them, documents as text, and damage that the reader alone lets pass."""
from __future__ import annotations

import json

import numpy as np

from megalm.data.indexed import IndexedReader, IndexedWriter
from megalm.data.statistics import Lengths
from tests.data.helpers import numbered, write
from tests.data.models import make_sentencepiece
from tests.tools.test_data import refused, run, sentences, with_gaps

REAL = ["The quick brown fox.", "床前明月光,疑是地上霜。", "def f(x):\n\treturn x + 1\n",
        "👩‍👩‍👧 😀🏳️‍🌈", "שלום עולם، مرحبا بالعالم", "e\u0301 \u200f\u0000"]


def encoded(prefix):
    """REAL in bytes; every document but the last two ends with 256."""
    write(prefix, [[*text.encode(), 256] for text in REAL] + [[65], []])
    return prefix


def report(capsys, *arguments) -> dict:
    assert run("inspect", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_numbers(tmp_path, capsys):
    encoded(tmp_path / "a")
    got = report(capsys, tmp_path / "a")
    lengths = np.array([len(text.encode()) + 1 for text in REAL] + [1, 0])
    assert (got["documents"], got["sequences"], got["tokens"], got["dtype"]) == (8, 8, lengths.sum(), "uint16")
    assert (got["eod"], got["documents_ending_with_eod"], got["eod_tokens"]) == (256, 6, 6)
    assert (got["lowest_id"], got["highest_id"], got["bin_bytes"]) == (0, 256, 2 * lengths.sum())
    assert got["percentiles"] == {str(p): int(np.percentile(lengths, p, method="inverted_cdf"))
                                  for p in (0, 1, 5, 25, 50, 75, 95, 99, 100)}
    assert got["histogram"][0] == {"from": 0, "below": 1, "documents": 1}
    assert sum(bar["documents"] for bar in got["histogram"]) == 8
    assert "highest_id" not in report(capsys, tmp_path / "a", "--quick")


def test_documents_of_several_sequences(tmp_path, capsys):
    reader = IndexedReader(sentences(tmp_path / "a", 300))
    got = report(capsys, tmp_path / "a", "--verify")
    _, lengths = reader.document_spans(np.arange(reader.num_documents))
    assert got["verified"] and got["tokens"] == lengths.sum() and got["sequences"] == len(reader)
    assert got["percentiles"]["50"] == int(np.percentile(lengths, 50, method="inverted_cdf"))
    assert got["eod"] is None


def test_percentiles_of_very_long_documents():
    lengths, random = Lengths(), np.random.default_rng(0)
    values = np.concatenate([random.integers(0, 5000, 900), random.integers(1 << 19, 1 << 24, 101)])
    lengths.add(values[:500])
    lengths.add(values[500:])
    wanted = (0, 0.1, 50, 89.9, 90, 95, 100)
    assert lengths.percentiles(wanted) == [int(np.percentile(values, p, method="inverted_cdf")) for p in wanted]
    assert sum(count for _, _, count in lengths.histogram()) == 1001


def test_a_table_for_people(tmp_path, capsys):
    encoded(tmp_path / "a")
    assert run("inspect", tmp_path / "a", "--verify") == 0
    out = capsys.readouterr().out
    assert "8 documents, 8 sequences" in out and "75.00% of the documents end with the id 256" in out
    assert "ids           0 to 256" in out and "describes every byte" in out and "32 to 63" in out
    write(tmp_path / "none", [])
    assert run("inspect", tmp_path / "none", "--verify") == 0 and "0 documents" in capsys.readouterr().out


def test_any_document_as_text(tmp_path, capsys):
    encoded(tmp_path / "a")
    for number, text in enumerate(REAL):
        assert run("inspect", tmp_path / "a", "--document", number, "--tokenizer", "bytes") == 0
        assert capsys.readouterr().out == text + "\n"
    assert run("inspect", tmp_path / "a", "--document", 6) == 0 and capsys.readouterr().out == "65\n"
    got = report(capsys, tmp_path / "a", "--document", 6, "--tokenizer", "bytes", "--tokens")
    assert got == {"document": 6, "length": 1, "tokens": [65], "text": "A"}
    for number in (8, -1):
        assert "which has 8, numbered from 0" in refused(capsys, "inspect", tmp_path / "a", "--document", number)


def test_a_sentence_each(tmp_path, capsys):
    """A document of several sequences, as sentences of a sentencepiece model."""
    from megalm.data.tokenizer import TokenizerSource, load_tokenizer
    model = make_sentencepiece(tmp_path / "spm.model")
    tokenizer = load_tokenizer(TokenizerSource("sentencepiece", str(model)))
    ids = [tokenizer.encode(text) for text in ("the quick brown fox", " 你好 😀")]
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1], [1])
        writer.add_document(sum(ids, []), [len(ids[0]), 0, len(ids[1])])
    assert run("inspect", tmp_path / "a", "--document", 1, "--tokenizer", model) == 0
    assert capsys.readouterr().out == "the quick brown fox 你好 😀\n"


def test_gaps_are_found(tmp_path, capsys):
    expected = with_gaps(tmp_path / "a")
    assert "don't follow one another in a.bin" in refused(capsys, "inspect", tmp_path / "a", "--verify")
    got = [report(capsys, tmp_path / "a", "--document", k)["tokens"] for k in range(3)]
    assert got == expected and report(capsys, tmp_path / "a")["percentiles"]["100"] == 3


def test_ids_of_another_tokenizer(tmp_path, capsys):
    numbered(tmp_path / "a", [200, 50, 50])
    assert run("inspect", tmp_path / "a", "--verify") == 0
    capsys.readouterr()
    assert "document 2 of" in (err := refused(capsys, "inspect", tmp_path / "a", "--verify", "--tokenizer", "bytes"))
    assert "holds the id 257, and the tokenizer has 257" in err
    assert "made with another tokenizer" in refused(capsys, "inspect", tmp_path / "a", "--tokenizer", "bytes", "--document", 2)


def test_damage_is_one_line(tmp_path, capsys):
    encoded(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    for command in (("inspect",), ("inspect", "--verify"), ("split", "--fractions", "rest,0,0"),
                    ("shuffle", "--output", tmp_path / "b")):
        assert "points past the end of a.bin" in refused(capsys, *command, tmp_path / "a")
    assert "is named without .bin" in refused(capsys, "inspect", tmp_path / "a.bin")
