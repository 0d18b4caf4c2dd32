"""Tokenizing: the fast encoder against the reference on real scripts and random ones, the check, and Megatron-LM's own loop."""
from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed import IndexedReader, IndexedWriter
from megalm.data.tokenizer import TokenizerSource, load_tokenizer
from megalm.tools.preprocess import backends, checking
from megalm.tools.preprocess.backends import Reference, fast_backend
from megalm.tools.preprocess.checking import Sample, first_difference, strange_samples
from megalm.tools.preprocess.encode import encode
from megalm.tools.preprocess.sentences import split_sentences
from tests.data.models import make_huggingface
from tests.tools.test_preprocess import json_lines, run

SCRIPTS = Path(__file__).with_name("many_scripts.jsonl")
REAL = [json.loads(line)["text"] for line in SCRIPTS.read_bytes().splitlines()]
LINES = [line for text in REAL for line in text.splitlines() if line.strip()] * 3
ALPHABET = [
    "<s>", "</s>", "<unk>", "<0x0A>", " ", "  ", "\n", "\t", "\0", "\x7f", "\u200b", "\ufeff", "\u00a0", "\u2581", "=", "a",
    "the", "é", "e\u0301", "你", "好", "😀", "👩\u200d👧", "א", "م", "\u0378", "\ufffd", "ﬁ", "<x>",
    "[y]", "<", "s", ">", "ing ", "Def", "1",
]


def sentencepiece_model(path: Path, **options) -> Path:
    """A BPE model of the Llama kind, on all scripts."""
    import sentencepiece
    model = io.BytesIO()
    usual = dict(vocab_size=700, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                 remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **(usual | options))
    path.write_bytes(model.getvalue())
    return path


MODELS = {
    "llama": {}, "no prefix": {"add_dummy_prefix": False}, "spaces": {"allow_whitespace_only_pieces": True},
    "own pieces": {"user_defined_symbols": ["<x>", "[y]", " a"]}, "normalized": {"normalization_rule_name": "nmt_nfkc"},
    "no extra spaces": {"remove_extra_whitespaces": True}, "control": {"control_symbols": ["<x>"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, options in MODELS.items():
        sentencepiece_model(folder / f"{name}.model", **options)
    make_huggingface(folder / "t.json")
    return folder


def load(folder: Path, name: str):
    return load_tokenizer(TokenizerSource("huggingface" if name == "t.json" else "sentencepiece", str(folder / name)))


def random_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 40))) for _ in range(count)]
    texts += ["".join(draw.choice(ALPHABET) * draw.randint(1, 50) for _ in range(5)) for _ in range(count)]

    def anything() -> str:
        return chr(draw.choice((draw.randint(0, 0x2ff), draw.randint(0x300, 0xd7ff), draw.randint(0xe000, 0x1ffff))))

    return texts + ["".join(anything() for _ in range(30)) for _ in range(count)]


@pytest.mark.parametrize("name", ["llama.model", "no prefix.model", "spaces.model", "own pieces.model", "control.model",
                                  "t.json"])
@pytest.mark.parametrize("short", [False, True])
def test_the_fast_one_is_the_reference(folder, name, short):
    """With the text of control pieces, which gigatoken's own conversion makes tokens of, and of user-defined ones."""
    tokenizer = load(folder, name)
    fast, why = fast_backend(tokenizer, short)
    assert fast is not None, why
    samples = [Sample(text) for text in (*REAL, *random_texts(700, 3))] + strange_samples(tokenizer)
    assert first_difference(samples, fast, Reference(tokenizer)) is None


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_the_references_whatever_the_model(folder, tmp_path, name, capsys):
    """With or without the check having allowed the fast one: `normalized` may differ, and then isn't used."""
    usual = ("--input", SCRIPTS, "--tokenizer", folder / f"{name}.model", "--quiet")
    assert run(*usual, "--output", tmp_path / "fast") == 0
    assert run(*usual, "--output", tmp_path / "right", "--check-documents", 0) == 0
    assert (tmp_path / "fast.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()
    assert (tmp_path / "fast.idx").read_bytes() == (tmp_path / "right.idx").read_bytes()


def test_ids_of_the_library_itself(folder, tmp_path):
    """What is written, decoded by nobody but numpy, against a plain loop over the tokenizer's own library."""
    tokenizer = load(folder, "llama.model")
    assert run("--input", SCRIPTS, "--output", tmp_path / "out", "--tokenizer", folder / "llama.model", "--workers", 2,
               "--piece-bytes", 1000) == 0
    with IndexedWriter(tmp_path / "plain", np.uint16) as writer:
        for text in REAL:
            ids = tokenizer.encode(text)
            writer.add_document(ids + [tokenizer.eod] * bool(ids), [len(ids) + 1] if ids else [])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"plain.{suffix}").read_bytes()


class Wrong:
    """A fast tokenizer that takes one word for another."""

    name = "wrong"

    def __init__(self, reference):
        self.reference = reference

    def __call__(self, texts):
        return self.reference([text.replace("fox", "fix") for text in texts])


@pytest.mark.parametrize("verify", [False, True])
def test_a_fast_one_that_differs(tmp_path, folder, monkeypatch, capsys, verify):
    """Found in the sample, it isn't used; where the sample misses it, --verify finds it. One line says which document."""
    right = load(folder, "llama.model")
    wrong = lambda *_: (Wrong(Reference(right)), "")  # noqa: E731
    monkeypatch.setattr("megalm.tools.preprocess.job.fast_backend", wrong)
    if verify:
        monkeypatch.setattr("megalm.tools.preprocess.pool.corpus_samples", lambda *_: [Sample("dog")])
    path = json_lines(tmp_path / "a.jsonl", ["dog", "", "the fox", "cat", "fox"])
    usual = ("--input", path, "--tokenizer", folder / "llama.model")
    assert run(*usual, "--output", tmp_path / "out", *["--verify"] * verify) == 0
    out, err = capsys.readouterr()
    if verify:
        assert err.splitlines() == [f"different: {path}, line {line}: the fast tokenizer gives other ids; the reference's "
                                    "were taken" for line in (3, 5)]
    else:
        assert err == (f"tokenizing at sentencepiece's own speed: wrong gives other ids for {path}, line 3, from token "
                       f"{err.split()[-2]} on\n")
    assert run(*usual, "--output", tmp_path / "right", "--check-documents", 0, "--quiet") == 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()


class PanicException(BaseException):
    """As pyo3 raises where Rust code panics."""


def test_a_fast_one_that_fails(tmp_path, folder, monkeypatch, capsys):
    class Failing:
        name = "failing"

        def __call__(self, texts):
            raise PanicException("index out\nof bounds")

    monkeypatch.setattr("megalm.tools.preprocess.job.fast_backend", lambda *_: (Failing(), ""))
    path = json_lines(tmp_path / "a.jsonl", ["dog"])
    assert run("--input", path, "--tokenizer", folder / "llama.model", "--output", tmp_path / "out") == 0
    assert "failing gives other ids for nothing: it fails (index out of bounds)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [PanicException, RuntimeError])
def test_a_fast_one_that_fails_after_the_check(tmp_path, folder, monkeypatch, capsys, kind):
    right = load(folder, "llama.model")

    class Failing:
        name = "failing"

        def __call__(self, texts):
            if "cat" in texts:
                raise kind("index out\nof bounds")
            return Reference(right)(texts)

    monkeypatch.setattr("megalm.tools.preprocess.job.fast_backend", lambda *_: (Failing(), ""))
    monkeypatch.setattr("megalm.tools.preprocess.pool.corpus_samples", lambda *_: [Sample("dog")])
    path = json_lines(tmp_path / "a.jsonl", ["dog", "cat"])
    usual = ("--input", path, "--tokenizer", folder / "llama.model")
    assert run(*usual, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().err == (f"different: {path}, line 1, 2 documents from there on: the fast tokenizer fails (index "
                                       "out of bounds); the reference's were taken\n")
    assert run(*usual, "--output", tmp_path / "right", "--check-documents", 0, "--quiet") == 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()


def failing_on(word: str, right, kind: type[BaseException]):
    """A fast tokenizer that fails on one word alone."""
    class Failing:
        name = "failing"

        def __call__(self, texts):
            if any(word in text for text in texts):
                raise kind("index out\nof bounds")
            return Reference(right)(texts)

    return Failing()


@pytest.mark.parametrize("kind", [None, PanicException, RuntimeError])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_wrong_or_failing_fast_one_in_two_workers(tmp_path, folder, monkeypatch, capsys, kind, sampled):
    """In the check, of which each has a share, and behind it."""
    right = load(folder, "llama.model")
    fast = Wrong(Reference(right)) if kind is None else failing_on("fox", right, kind)
    monkeypatch.setattr("megalm.tools.preprocess.job.fast_backend", lambda *_: (fast, ""))
    monkeypatch.setattr("megalm.tools.preprocess.program.strange_samples", lambda _: [])  # beside them a share has all others
    if not sampled:
        monkeypatch.setattr("megalm.tools.preprocess.pool.corpus_samples", lambda *_: [Sample("dog")] * 40)
    path = json_lines(tmp_path / "a.jsonl", ["dog"] * 30 + ["the fox"] + ["cat"] * 30)
    usual = ("--input", path, "--tokenizer", folder / "llama.model", "--piece-bytes", 100, "--workers", 2)
    assert run(*usual, "--output", tmp_path / "out", "--verify") == 0
    err = capsys.readouterr().err
    where = f"{path}, line 31, from token " if kind is None else "nothing: it fails (index out of bounds)"
    assert (f"gives other ids for {where}" in err) == sampled and ("different: " in err) != sampled
    assert run(*usual, "--output", tmp_path / "right", "--check-documents", 0, "--quiet") == 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()


def test_a_fast_one_that_fails_for_good(tmp_path, folder, monkeypatch, capsys):
    """No other can be made of the model: the reference goes on, in the same part too."""
    class Failing:
        name = "failing"

        def __call__(self, texts):
            raise RuntimeError("out of memory")

    made = iter([(Failing(), "")])
    monkeypatch.setattr("megalm.tools.preprocess.job.fast_backend", lambda *_: next(made, (None, "it can't be loaded")))
    monkeypatch.setattr("megalm.tools.preprocess.pool.Pool.first_difference", lambda *_: None)
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_text(f"the text of {path.name}")
    usual = ("--input", *paths, "--tokenizer", folder / "llama.model", "--quiet")
    assert run(*usual, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().err.count("the fast tokenizer fails (out of memory); the reference's were taken") == 1
    assert run(*usual, "--output", tmp_path / "right", "--check-documents", 0) == 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()


def test_without_the_fast_library(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken.gigatoken_rs", None)
    path = json_lines(tmp_path / "a.jsonl", ["dog"])
    assert run("--input", path, "--tokenizer", folder / "llama.model", "--output", tmp_path / "out") == 0
    assert "at sentencepiece's own speed: gigatoken isn't installed (pip install 'megalm[corpus]')" in capsys.readouterr().err


@pytest.mark.parametrize("count", [100, 2000])
def test_the_sample_has_the_longest_and_the_strangest(tmp_path, count):
    from megalm.tools.preprocess.inputs import find_sources, make_units
    from megalm.tools.preprocess.texts import Policy
    texts = [f"plain words number {i}" for i in range(3000)]
    texts[1234], texts[2345], texts[77] = "long " * 5000, "odd \u200b\u0378\x07", "see <|endoftext|> and </s>"
    path = json_lines(tmp_path / "a.jsonl", texts)
    sources = find_sources([path], None)
    chosen = checking.corpus_samples(sources, make_units(sources, 10_000), Policy("text"), count)
    found = [sample.text for sample in chosen]
    assert {texts[1234], texts[2345], texts[77]} <= set(found) and 0.6 * count <= len(found) <= 1.1 * count
    assert next(sample for sample in chosen if sample.text == texts[77]).where() == f"{path}, line 78"


def sampled(path, count: int = 2000) -> list[Sample]:
    from megalm.tools.preprocess.inputs import find_sources, make_units
    from megalm.tools.preprocess.texts import Policy
    sources = find_sources([str(path)], None)
    return checking.corpus_samples(sources, make_units(sources, 1 << 26), Policy("text"), count)


def test_parts_stand_for_documents_that_are_too_long(tmp_path):
    """A corpus of books: each is in the sample, and the sample stays small."""
    books = [f"<{i}" + "long " * 30_000 + "middle" + " long" * 30_000 + f"{i}>" for i in range(40)]
    path = json_lines(tmp_path / "a.jsonl", books)
    chosen = sampled(path)
    assert len(chosen) == 40 and sum(len(sample.text) for sample in chosen) <= 2 * checking.LEAST_BYTES
    for i, sample in enumerate(chosen):
        assert sample.text.startswith(f"<{i}long") and "middle" in sample.text and sample.text.endswith(f"long{i}>")
        assert sample.where() == f"parts of {path}, line {i + 1}"


def test_the_sample_of_a_compressed_file_is_not_its_beginning(tmp_path):
    import gzip
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " + "word " * 60}) + "\n")
    numbers = [int(sample.text.split()[0]) for sample in sampled(path)]
    assert len(numbers) > 1500 and max(numbers) > 18_000


def test_the_sample_of_text_files_is_bounded(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("é" * 400_000)
    chosen = sampled(tmp_path)
    assert len(chosen) == 3 and all(set(sample.text) == {"é"} for sample in chosen)
    assert all(len(sample.text) <= checking.PLACE_BYTES // 2 and not sample.chunk.raw for sample in chosen)


def test_nothing_to_compare_on(tmp_path, folder, monkeypatch, capsys):
    """Where the sample is empty, the fast one isn't used on what comes."""
    path = tmp_path / "a.jsonl"
    path.write_text('x\n{"text": "dog"}\n')
    monkeypatch.setattr(checking, "PLACES", 1)
    monkeypatch.setattr(checking, "PLACE_BYTES", 2)
    assert run("--input", path, "--tokenizer", folder / "llama.model", "--output", tmp_path / "out", "--skip-invalid") == 0
    out, err = capsys.readouterr()
    assert "no document could be read to compare the fast one on" in err and "tokenized by sentencepiece" in out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_byte_to_compare_on(tmp_path, folder, capsys, workers):
    path = tmp_path / "a.jsonl"
    path.touch()
    assert run("--input", path, "--tokenizer", folder / "llama.model", "--output", tmp_path / "out", "--workers", workers) == 2
    assert "error: no text in" in capsys.readouterr().err and not (tmp_path / "out.work").exists()


def test_a_tokenizer_that_remembers_is_renewed(folder, monkeypatch):
    monkeypatch.setattr(backends, "RENEW_BYTES", 10)
    fast, _ = fast_backend(load(folder, "llama.model"))
    first = fast.model
    fast(["a b c d e f g"])
    fast(["x"])
    assert fast.model is not first


@pytest.mark.parametrize("check", [0, 2000])
def test_text_never_becomes_a_special_token_unasked(folder, tmp_path, check, capsys):
    """With the reference and with the fast one; asked for, it is as Megatron-LM has it."""
    path = json_lines(tmp_path / "a.jsonl", ["a<|endoftext|>b", "plain", "<|endoftext|>"])
    usual = ("--input", path, "--tokenizer", folder / "t.json", "--eod", "<|endoftext|>", "--check-documents", check)
    plain = load_tokenizer(TokenizerSource("huggingface", str(folder / "t.json"), special_tokens=False))
    for asked, expected in (([], plain), (["--special-tokens"], load(folder, "t.json"))):
        assert run(*usual, "--output", tmp_path / f"out{len(asked)}", *asked) == 0
        assert ("gigatoken" in capsys.readouterr().out) == bool(check)
        reader = IndexedReader(tmp_path / f"out{len(asked)}")
        assert [reader.tokens(i).tolist() for i in range(3)] == [
            [*expected.encode(text), 1000] for text in ("a<|endoftext|>b", "plain", "<|endoftext|>")]
    assert 1000 not in plain.encode("a<|endoftext|>b") and 1000 in expected.encode("a<|endoftext|>b")
    assert plain.decode(plain.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_sentences():
    text = ("Dr. Weiss saw it at 3.5 m, e.g. by night. \"Was it lost?\" Nobody knew... The end!\n\nA title\n\n你好。再见！（完） "
            "هل تريد؟ نعم. J. Doe left")
    assert split_sentences(text) == ["Dr. Weiss saw it at 3.5 m, e.g. by night.", '"Was it lost?"', "Nobody knew...", "The end!",
                                     "A title", "你好。", "再见！", "（完） هل تريد؟", "نعم.", "J. Doe left"]
    for whole in REAL:
        assert "".join("".join(split_sentences(whole)).split()) == "".join(whole.split())


def test_sentences_are_sequences(tmp_path):
    """As preprocess_data.py --split-sentences --append-eod: a document of sequences, the end in the last one."""
    path = json_lines(tmp_path / "a.jsonl", ["One. Two.", "", "  ", "Three"])
    assert run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--split-sentences") == 0
    reader = IndexedReader(tmp_path / "out")
    assert [bytes(reader.tokens(i)[:3].astype(np.uint8)) for i in range(3)] == [b"One", b"Two", b"Thr"]
    assert reader.lengths.tolist() == [4, 5, 6] and reader.document_indices.tolist() == [0, 2, 2, 2, 3]


def test_documents_arrays():
    tokenizer = Reference(load_tokenizer(TokenizerSource("bytes")))
    documents = encode(["ab", "", "c"], tokenizer, 256, np.dtype(np.uint16))
    assert documents.tokens.tolist() == [97, 98, 256, 99, 256] and documents.document_lengths().tolist() == [3, 0, 2]
    kept = documents.keep(np.array([False, True, True]))
    assert (kept.tokens.tolist(), kept.lengths.tolist(), kept.counts.tolist()) == ([99, 256], [2], [0, 1])
    nothing = encode([], tokenizer, 256, np.dtype(np.uint16))
    assert len(nothing.tokens) == len(nothing.lengths) == len(nothing.counts) == 0
