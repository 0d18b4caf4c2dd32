"""Cleaning: every flag, what it counts, and that neither workers nor a restart change what stays."""
from __future__ import annotations

import json

import numpy as np
import pytest

from megalm.data.indexed import IndexedReader
from megalm.tools.kill_preprocess import outputs
from megalm.tools.preprocess import merge
from megalm.tools.preprocess.cleaning import EMAILS, SECRETS, Cleaner, Cleaning
from megalm.tools.preprocess.duplicates import ExactDuplicates, NearDuplicates, near_marks, shingles, with_words
from tests.tools.test_preprocess import json_lines, refused, run
from tests.tools.test_preprocess_restart import stop_at

LONG = "the quick brown fox jumps over the lazy dog and runs into the dark forest where nobody has ever seen it again "


def texts(prefix) -> list[str]:
    reader = IndexedReader(prefix)
    spans = zip(*reader.document_spans(np.arange(reader.num_documents)), strict=True)
    return [bytes(reader.flat[start:start + length].astype(np.uint8)[:-1]).decode() for start, length in spans]


def clean(tmp_path, documents, *flags) -> tuple[list[str], dict]:
    path = json_lines(tmp_path / "a.jsonl", documents)
    assert run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--force", "--quiet",
               "--report", tmp_path / "r.json", *flags) == 0
    return texts(tmp_path / "out"), json.loads((tmp_path / "r.json").read_text())


def test_normalization(tmp_path):
    documents = ["cafe\u0301", "café", "ﬁ", "\u212b"]
    kept, report = clean(tmp_path, documents, "--normalize", "NFC")
    assert kept == ["café", "café", "ﬁ", "Å"] and report["changed"] == {"normalized to NFC": 2}
    kept, report = clean(tmp_path, documents, "--normalize", "NFKC")
    assert kept == ["café", "café", "fi", "Å"] and report["changed"] == {"normalized to NFKC": 3}


@pytest.mark.parametrize("secret", [
    "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMIIEvgIBADANBgkqhkiG\n9w0BAQEFAASCBKgwggSk",
    r"-----BEGIN PRIVATE KEY-----\nMIIEvgIBADANBgkqhkiG\n9w0BAQEFAASC\n-----END PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,00\n\nMIIEvgIBADANBgkqhkiG\nab==\n"
    "-----END RSA PRIVATE KEY-----",
    "AKIAABCDEFGHIJKLMNOP",
    "ghp_" + "a1" * 18, "xoxb-123456789012-abc", "AIza" + "x" * 35, "sk_live_" + "9" * 20, "sk-" + "a" * 40,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
])
def test_secrets(secret):
    assert SECRETS.sub("[SECRET]", f"a {secret}") == "a [SECRET]"
    cleaner = Cleaner(Cleaning(secrets="drop"))
    assert cleaner(f"key: {secret}", {}) == (None, "with secrets") and cleaner("AKIA is short, sk-8 too", {})[0]


def test_a_password_in_code_and_what_is_none():
    assert SECRETS.sub("[SECRET]", "password = 'hunter2hunter2'") == "[SECRET]'"
    for text in ("password = input()", "the secret: 'no'", "token = next(tokens)", "-----BEGIN CERTIFICATE-----"):
        assert not SECRETS.search(text)


def test_secrets_leave_prose_and_take_linear_time():
    assert SECRETS.sub("[SECRET]", "a file begins with -----BEGIN RSA PRIVATE KEY----- and is kept apart, says the manual") == (
        "a file begins with [SECRET] and is kept apart, says the manual")
    key = "-----BEGIN PRIVATE KEY-----"
    for many in ("eyJaaaaaaaaaa-" * 20_000, key + "\n" * 200_000, f"{key}\nx" * 999):
        SECRETS.sub("[SECRET]", many)  # quadratic, the first would take minutes


def test_emails(tmp_path):
    documents = ["write to jo.e+x@mail.example.com, or jo@b.de.", "@decorator\ndef f(): a@b", "git@host:repo"]
    kept, report = clean(tmp_path, documents, "--emails", "redact")
    assert kept == ["write to [EMAIL], or [EMAIL].", *documents[1:]] and report["changed"] == {"e-mail addresses redacted": 1}
    kept, report = clean(tmp_path, documents, "--emails", "drop")
    assert kept == documents[1:] and report["left_out"] == {"with e-mail addresses": {"documents": 1, "bytes": len(documents[0])}}
    assert not EMAILS.search("a@b.c") and not EMAILS.search("x" * 100_000 + "@")


def test_what_is_left_out_where_parts_come_together_is_not_read(tmp_path, monkeypatch):
    """Runs of documents of several sequences, some of them empty, are copied as they lie; no array of their tokens is made."""
    from megalm.tools.preprocess.parts import Part
    real = Part.array
    monkeypatch.setattr(Part, "array", lambda self, name: real(self, name) if name != "tokens" else pytest.fail("read"))
    documents = ["One. Two.", "", "a b", "One. Two.", "Three. Four. Five.", "a b", "", "end", "end"]
    path = json_lines(tmp_path / "a.jsonl", documents)
    assert run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--deduplicate", "--split-sentences") == 0
    reader = IndexedReader(tmp_path / "out")
    sentences = [bytes(reader.tokens(i)[reader.tokens(i) < 256].astype(np.uint8)).decode() for i in range(len(reader))]
    assert sentences == ["One.", "Two.", "a b", "Three.", "Four.", "Five.", "end"]
    assert reader.document_indices.tolist() == [0, 2, 2, 3, 6, 7]


def test_lengths(tmp_path):
    documents = ["a", "bb", "ccc", "dddd", "é" * 2]
    kept, report = clean(tmp_path, documents, "--min-characters", 2, "--max-characters", 3)
    assert kept == ["bb", "ccc", "éé"]
    assert {why: left["documents"] for why, left in report["left_out"].items()} == {"too short": 1, "too long": 1}
    kept, report = clean(tmp_path, documents, "--min-tokens", 3, "--max-tokens", 4)
    assert kept == ["bb", "ccc"] and report["left_out"] == {
        "of too few tokens": {"documents": 1, "bytes": 1}, "of too many tokens": {"documents": 2, "bytes": 8}}
    assert report["in"] == {"documents": 5, "bytes": 14} and report["out"]["bytes"] == 5


def test_languages(tmp_path, capsys):
    documents = [LONG, "清晨的集市很热闹。卖豆腐的老人说今天的豆子特别好，孩子们围着糖画摊子看师傅画龙。",
                 "Le marché du matin est très animé et les enfants regardent le vieil homme qui dessine un dragon.", "x = 1"]
    kept, report = clean(tmp_path, documents, "--languages", "en,zh")
    assert kept == [documents[0], documents[1], documents[3]] and list(report["left_out"]) == ["in another language (fr)"]
    usual = ("--input", tmp_path / "a.jsonl", "--output", tmp_path / "x", "--tokenizer", "bytes")
    err = refused(capsys, *usual, "--languages", "en,xx")
    assert "--languages xx: known are " in err and not (tmp_path / "x.work").exists()


def test_duplicates(tmp_path):
    documents = ["a", "b", "a", "", "", "b "]
    kept, report = clean(tmp_path, documents, "--deduplicate", "--piece-bytes", 20)
    assert kept == ["a", "b", "", "b "] and report["left_out"] == {"duplicates": {"documents": 2, "bytes": 1}}


def near_copies() -> list[str]:
    """Of every text a copy with one word changed, at the other end of the corpus."""
    random = np.random.default_rng(5)
    words = [f"w{i}" for i in range(400)]
    originals = [" ".join(random.choice(words, 120)) for _ in range(25)]
    return originals + [text.replace(text.split()[60], "other", 1) for text in originals] + ["", "...", "w1 w2", "w1 w2"]


def test_near_duplicates(tmp_path):
    documents = near_copies()
    kept, report = clean(tmp_path, documents, "--near-duplicates", "0.7")
    assert kept == [*documents[:25], "", "...", "w1 w2"] and report["left_out"]["near duplicates"]["documents"] == 26
    kept, _ = clean(tmp_path, documents, "--near-duplicates", "1")
    assert kept == documents[:-1]


def test_the_estimate_is_the_similarity_of_shingles():
    words = [f"w{i}" for i in range(300)]
    one, two = " ".join(words), " ".join([*words[:250], *(f"v{i}" for i in range(50))])
    a, b = set(shingles(one)), set(shingles(two))
    rows = near_marks([one, two]).reshape(2, -1)
    assert abs((rows[0] == rows[1]).mean() - len(a & b) / len(a | b)) < 0.12
    assert shingles("你好 世界，再见") == ["你 好 世 界 再", "好 世 界 再 见"]
    assert shingles("Short Text") == ["short text"] and shingles("…") == []


FLAGS = ("--deduplicate", "--near-duplicates", "--normalize", "NFC", "--emails", "redact", "--max-tokens", "900")


def test_workers_and_a_restart_change_nothing(tmp_path, monkeypatch, capsys):
    documents = near_copies() * 2 + ["x" * 5000, "mail a@b.com"]
    path = json_lines(tmp_path / "a.jsonl", documents)
    usual = ("--input", path, "--tokenizer", "bytes", *FLAGS)
    assert run(*usual, "--output", tmp_path / "one", "--report", tmp_path / "one.json") == 0
    assert run(*usual, "--output", tmp_path / "two", "--report", tmp_path / "two.json", "--workers", 2,
               "--piece-bytes", 9000) == 0
    monkeypatch.setattr(merge, "EVERY", 0)
    for count in (2, 6, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, merge, "Part", count)
            with pytest.raises(SystemExit):
                run(*usual, "--output", tmp_path / "three", "--piece-bytes", 2000)
    assert run(*usual, "--output", tmp_path / "three", "--report", tmp_path / "three.json", "--piece-bytes", 2000) == 0
    assert "going on" in capsys.readouterr().err
    for other in ("two", "three"):
        assert outputs(tmp_path / other)[:2] == outputs(tmp_path / "one")[:2]
        assert (tmp_path / f"{other}.json").read_text() == (tmp_path / "one.json").read_text()


def test_report(tmp_path):
    _, report = clean(tmp_path, ["a" * 10, "b" * 100, "b" * 100, ""], "--deduplicate")
    assert report["in"] == {"documents": 4, "bytes": 210} and report["tokens_histogram"] == {"8": 1, "64": 1}
    assert report["out"] == {"documents": 3, "sequences": 2, "tokens": 112, "bytes": 110, "empty_documents": 1,
                             "bytes_per_token": 110 / 112, "tokens_per_document": 112 / 3}
    table = (tmp_path / "r.txt").read_text()
    assert "left out: duplicates" in table and "0.982 bytes a token" in table
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_near_duplicates_grow(tmp_path):
    """Part by part, and after a restart; 192 bytes each in memory."""
    rows = np.random.default_rng(0).integers(0, 1 << 31, (3000, 128)).astype("<u4")
    rows[7] = np.iinfo("<u4").max  # without a word
    kind, everyone = NearDuplicates(0.9), np.ones(1000, bool)
    with open(tmp_path / "near", "w+b", buffering=0) as file:
        kind.go_on(file)
        for low in range(0, 3000, 1000):
            assert kind.first(rows[low:low + 1000], everyone).all()
        for again in (kind, NearDuplicates(0.9)):
            again.go_on(file) if again is not kind else None
            mine = rows[np.random.default_rng(1).permutation(3000)]
            mine[with_words(mine), :12] = 5  # 116 of 128 agree: 0.906
            assert (again.first(mine, np.ones(3000, bool)) == ~with_words(mine)).all()
        assert sum(array.nbytes for band in kind.bands for run in band.runs for array in run) == 192 * 2999


def test_duplicates_within_and_across_parts(tmp_path):
    """Against the sets of a plain loop; halves of marks that agree by chance don't count."""
    marks, seen = np.random.default_rng(2).integers(0, 12, (900, 2)).astype("<u8"), set()
    kind = ExactDuplicates()
    with open(tmp_path / "exact", "w+b", buffering=0) as file:
        kind.go_on(file)
        for low in range(0, 900, 100):
            candidates = np.arange(100) % 7 != 0
            kept = kind.first(marks[low:low + 100], candidates)
            for mark, candidate, stays in zip(map(tuple, marks[low:low + 100].tolist()), candidates, kept, strict=True):
                assert stays == (candidate and mark not in seen)
                seen.update([mark] if candidate else [])
    assert len(seen) == 144


@pytest.mark.parametrize("flags, message", [
    (("--min-tokens", "9", "--max-tokens", "3"), "--min-tokens 9 is above --max-tokens 3"),
    (("--near-duplicates", "2"), "2 is not a similarity above 0 and at most 1"),
    (("--normalize", "NFD"), "invalid choice"),
])
def test_bad_flags(tmp_path, capsys, flags, message):
    path = json_lines(tmp_path / "a.jsonl", ["a"])
    assert message in refused(capsys, "--input", path, "--output", tmp_path / "x", "--tokenizer", "bytes", *flags)
