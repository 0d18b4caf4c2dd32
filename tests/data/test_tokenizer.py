"""Each kind of tokenizer: round trips, the end of document, what it is loaded from, and bad files."""
from __future__ import annotations

import subprocess
import sys

import pytest

from megalm.data.errors import DataError
from megalm.data.tokenizer import TokenizerSource, guess_source, load_tokenizer
from tests.data.models import TEXTS, make_huggingface, make_sentencepiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """spm.model and tokenizer.json, trained once on the texts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    make_sentencepiece(folder / "spm.model")
    make_huggingface(folder / "tokenizer.json")
    return folder


def test_bytes():
    tokenizer = load_tokenizer(TokenizerSource("bytes"))
    assert (tokenizer.type, tokenizer.vocab_size, tokenizer.eod, tokenizer.files()) == ("bytes", 257, 256, [])
    assert tokenizer.encode("né") == [110, 195, 169]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert tokenizer.decode([110, 195, 256, 300]) == "n\N{REPLACEMENT CHARACTER}"
    with pytest.raises(DataError, match="bytes tokenizer has no token '</s>'"):
        load_tokenizer(TokenizerSource("bytes", eod="</s>"))


def test_sentencepiece(folder):
    tokenizer = load_tokenizer(TokenizerSource("sentencepiece", str(folder / "spm.model")))
    assert tokenizer.type == "sentencepiece" and tokenizer.eod == 2 and tokenizer.files() == [folder / "spm.model"]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids) and 2 not in ids
        assert tokenizer.decode([*ids, 2]) == text
    assert load_tokenizer(TokenizerSource("sentencepiece", str(folder / "spm.model"), "<s>")).eod == 1
    with pytest.raises(DataError, match="spm.model has no token '<endoftext>'|has no token"):
        load_tokenizer(TokenizerSource("sentencepiece", str(folder / "spm.model"), "<endoftext>"))
    with pytest.raises(DataError, match="has no token '</S>'; the nearest is '</?s>'"):
        load_tokenizer(TokenizerSource("sentencepiece", str(folder / "spm.model"), "</S>"))


def test_huggingface(folder):
    source = TokenizerSource("huggingface", str(folder / "tokenizer.json"), "<|endoftext|>")
    tokenizer = load_tokenizer(source)
    assert tokenizer.type == "huggingface" and tokenizer.files() == [folder / "tokenizer.json"]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.decode([*ids, tokenizer.eod]) == text
    assert tokenizer.eod == tokenizer.vocab_size - 1 == 1000  # the id is past the number of tokens: ids have a gap
    assert load_tokenizer(TokenizerSource("huggingface", str(folder / "tokenizer.json"))).eod is None
    with pytest.raises(DataError, match=r"has no token '<endoftext>'; the nearest is '<\|endoftext\|>'"):
        load_tokenizer(TokenizerSource("huggingface", str(folder / "tokenizer.json"), "<endoftext>"))


def test_huggingface_adds_nothing_and_cuts_nothing(folder, tmp_path):
    """A post-processor that adds a token and a truncation to 4 are for inference: neither may touch a corpus."""
    import tokenizers
    changed = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1000)])
    changed.enable_truncation(4)
    changed.enable_padding(length=64)
    changed.save(str(tmp_path / "tokenizer.json"))
    plain, other = (load_tokenizer(TokenizerSource("huggingface", str(where / "tokenizer.json"))) for where in (folder, tmp_path))
    assert all(plain.encode(text) == other.encode(text) for text in TEXTS)


@pytest.mark.parametrize("kind, name", [("sentencepiece", "bad.model"), ("huggingface", "bad.json")])
@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"\x00" * 50])
def test_files_that_are_no_tokenizers(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} (isn't a|is empty, not a)") as error:
        load_tokenizer(TokenizerSource(kind, str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_missing_things(tmp_path):
    for source, message in [
        (TokenizerSource("sentencepiece", str(tmp_path / "x.model")), "x.model is missing"),
        (TokenizerSource("huggingface", str(tmp_path)), "is a folder; name its file"),
        (TokenizerSource("huggingface"), "a huggingface tokenizer needs a path"),
        (TokenizerSource("wordpiece", "x"), "tokenizer type 'wordpiece'; known are"),
    ]:
        with pytest.raises(DataError, match=message):
            load_tokenizer(source)


def test_guess(folder, tmp_path):
    model = str(folder / "spm.model")
    assert guess_source("bytes") == TokenizerSource("bytes")
    assert guess_source("./bytes", "sentencepiece") == TokenizerSource("sentencepiece", "bytes")
    assert guess_source(model) == TokenizerSource("sentencepiece", model)
    assert guess_source("a/b.json", eod="x") == TokenizerSource("huggingface", "a/b.json", "x")
    assert guess_source(str(folder)).path == str(folder / "tokenizer.json")
    assert guess_source("odd.name", "huggingface").type == "huggingface"
    with pytest.raises(DataError, match="odd.name: .* --tokenizer-type"):
        guess_source("odd.name")
    with pytest.raises(DataError, match="neither tokenizer.json nor tokenizer.model"):
        guess_source(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="both tokenizer.json and tokenizer.model"):
        guess_source(str(tmp_path))
    assert guess_source(str(tmp_path), "sentencepiece").path == str(tmp_path / "tokenizer.model")


def test_preparing_data_imports_no_torch(folder):
    code = ("import sys, megalm.data, megalm.tools.preprocess, megalm.tools.train_tokenizer, megalm.tools.collect_corpus\n"
            "from megalm.data import IndexedWriter, load_tokenizer\nfrom megalm.data.tokenizer import TokenizerSource as S\n"
            f"load_tokenizer(S('sentencepiece', {str(folder / 'spm.model')!r}))\n"
            f"load_tokenizer(S('huggingface', {str(folder / 'tokenizer.json')!r}))\n"
            "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
