"""Text to token ids and back: sentencepiece models, Hugging Face tokenizer.json files, bytes.

Each library is imported when its tokenizer is loaded; none of this imports torch.
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .errors import DataError

TYPES = ("sentencepiece", "huggingface", "bytes")
USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "[EOS]")


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    type: str
    vocab_size: int  # ids are below it
    eod: int | None  # the end-of-document token, if it has one

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no token added. Raises UnicodeEncodeError for lone surrogates."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; the end-of-document token gives none."""

    def files(self) -> list[Path]:
        """The files a checkpoint needs to load this tokenizer again."""


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from; the config's tokenizer section has the same first three attributes."""

    type: str
    path: str | None = None
    eod: str | None = None  # the text of the end-of-document token
    special_tokens: bool = True  # does the text of a special token become that token, as in a prompt? Else it is plain text


def load_tokenizer(source) -> Tokenizer:
    """The tokenizer of a config section or TokenizerSource.

    Raises DataError if its file is missing or isn't such a tokenizer, or if it lacks the token named as `eod`.
    """
    if source.type == "bytes":
        if source.eod is not None:
            raise DataError(f"the bytes tokenizer has no token {source.eod!r}: its end of document is 256")
        return BytesTokenizer()
    if source.type not in TYPES:
        raise DataError(f"tokenizer type {source.type!r}; known are {', '.join(TYPES)}")
    if source.path is None:
        raise DataError(f"a {source.type} tokenizer needs a path")
    path = Path(source.path)
    if not path.is_file():
        raise DataError(f"tokenizer {path} is {'a folder; name its file' if path.is_dir() else 'missing'}")
    if source.type == "sentencepiece":
        return SentencePieceTokenizer(path, source.eod)
    return HuggingFaceTokenizer(path, source.eod, getattr(source, "special_tokens", True))


def guess_source(name: str, kind: str | None = None, eod: str | None = None) -> TokenizerSource:
    """What a user names by one word: "bytes", a .model file (sentencepiece), a .json file (Hugging Face), a folder with one.

    Raises DataError where the name doesn't say which and `kind` isn't given.
    """
    if kind == "bytes" or (kind is None and name == "bytes"):
        return TokenizerSource("bytes", None, eod)
    path = Path(name)
    if path.is_dir():
        usual = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}
        found = [path / file for file in usual if (path / file).is_file() and kind in (None, usual[file])]
        if len(found) != 1:
            raise DataError(f"{path} is a folder with {'both' if found else 'neither'} tokenizer.json "
                            f"{'and' if found else 'nor'} tokenizer.model; name the file")
        path = found[0]
    kind = kind or {".model": "sentencepiece", ".json": "huggingface"}.get(path.suffix)
    if kind is None:
        raise DataError(f"tokenizer {name}: neither .model nor .json nor the word bytes; say which with --tokenizer-type")
    return TokenizerSource(kind, str(path), eod)


def missing_token(path: Path, token: str, vocabulary: Iterable[str]) -> DataError:
    """The error for a token that isn't in the vocabulary; names the nearest one."""
    near = difflib.get_close_matches(token, vocabulary, n=1, cutoff=0.4)
    return DataError(f"{path} has no token {token!r}" + (f"; the nearest is {near[0]!r}" if near else ""))


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255; 256 ends a document."""

    type = "bytes"
    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def files(self) -> list[Path]:
        return []


class SentencePieceTokenizer:
    """A .model file of sentencepiece. The end of document is its eos piece, or the piece that `eod` names."""

    type = "sentencepiece"

    def __init__(self, path: Path, eod: str | None = None):
        """Raises DataError if the file isn't a model or has no piece `eod`."""
        import sentencepiece

        self.path, proto = path, path.read_bytes()
        if not proto:  # the library takes nothing for a model and complains later
            raise DataError(f"{path} is empty, not a sentencepiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise DataError(f"{path} isn't a sentencepiece model") from error
        self.vocab_size = self._model.get_piece_size()
        self.eod = self._model.eos_id() if self._model.eos_id() >= 0 else None
        if eod is not None:
            self.eod = self._model.piece_to_id(eod)
            if self._model.id_to_piece(self.eod) != eod:
                raise missing_token(path, eod, map(self._model.id_to_piece, range(self.vocab_size)))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i != self.eod])

    def files(self) -> list[Path]:
        return [self.path]


class HuggingFaceTokenizer:
    """A tokenizer.json. Such a file doesn't say which token ends a document: `eod` does."""

    type = "huggingface"

    def __init__(self, path: Path, eod: str | None = None, special_tokens: bool = True):
        """`special_tokens` as in TokenizerSource. Raises DataError if the file isn't a tokenizer or has no token `eod`."""
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} isn't a tokenizer.json: {' '.join(str(error).split())}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not special_tokens
        added_tokens = self._tokenizer.get_added_tokens_decoder().values()
        self.added_tokens = [token.content for token in added_tokens]
        self.plain_tokens = [] if special_tokens else [token.content for token in added_tokens if token.special]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps: the count isn't enough
        self.eod = None if eod is None else vocabulary.get(eod)
        if eod is not None and self.eod is None:
            near = difflib.get_close_matches(eod, self.added_tokens, n=1, cutoff=0.4)
            raise missing_token(path, eod, self.added_tokens if near else vocabulary)
        self.eod_candidates = [token for token in USUAL_EOD if token in vocabulary]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=True)

    def token(self, number: int) -> str | None:
        """The token with this id, as the file spells it."""
        return self._tokenizer.id_to_token(number) if number >= 0 else None

    def files(self) -> list[Path]:
        return [self.path]
