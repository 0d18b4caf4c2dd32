"""Texts to token ids, many at a time, as flat arrays: the reference tokenizer, and a fast one where it can serve.

A fast backend is a promise that checking.py holds to the test before anything is written with it.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from megalm.data.tokenizer import Tokenizer

Encoded = tuple[np.ndarray, np.ndarray]  # ids of all texts, one after another [n]; ids of each text, int64 [texts]
SAID = 120  # characters of a foreign error in a line of ours
RENEW_BYTES = 2 << 30  # of text, after which a tokenizer that remembers words is made anew


class Backend(Protocol):
    """What turns texts to ids."""

    name: str

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The ids of every text, with nothing added."""


class Reference:
    """The tokenizer's own library, or numpy for bytes: what is right by definition."""

    def __init__(self, tokenizer: Tokenizer):
        self.name, self.tokenizer = tokenizer.type, tokenizer

    def __call__(self, texts: Sequence[str]) -> Encoded:
        if self.tokenizer.type == "bytes":
            parts = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            parts = [np.asarray(self.tokenizer.encode(text), np.int32) for text in texts]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return joined(parts, np.int32), lengths


class Gigatoken:
    """gigatoken's encoder, on this thread. Texts in which `unsafe` finds something go to the reference instead."""

    name = "gigatoken"

    def __init__(self, make: Callable, reference: Reference, unsafe: re.Pattern | None, short: bool):
        """`short`: many texts a call, faster for texts of a line or two; else one a call, which needs no awkward arrays."""
        self.make, self.reference, self.unsafe, self.short = make, reference, unsafe, short
        self.model, self.seen = make(), 0

    def __call__(self, texts: Sequence[str]) -> Encoded:
        if self.unsafe is not None:
            apart = [place for place, text in enumerate(texts) if self.unsafe.search(text)]
            if apart:
                return self._mixed(texts, apart)
        if self.seen > RENEW_BYTES:  # what it remembers of rare words would grow for ever
            self.model, self.seen = self.make(), 0
        self.seen += sum(map(len, texts))
        if not self.short:
            parts = [self.model.encode(text) for text in texts]
            return joined(parts, np.uint32), np.fromiter(map(len, parts), np.int64, len(texts))
        layout = self.model.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0]:offsets[-1]], np.diff(offsets)

    def _mixed(self, texts: Sequence[str], apart: list[int]) -> Encoded:
        """Each run of texts of one kind by its own tokenizer."""
        edges = [0, *(edge for place in apart for edge in (place, place + 1)), len(texts)]
        parts = [self.reference(texts[low:high]) if odd % 2 else self(texts[low:high])
                 for odd, (low, high) in enumerate(zip(edges, edges[1:], strict=False)) if high > low]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])


def failure_of(error: BaseException) -> str | None:
    """How a fast tokenizer failed, if the error is one of its own: a Rust library's panic is no Exception."""
    if isinstance(error, RuntimeError) or type(error).__name__ == "PanicException":
        return in_a_line(error)
    return None


def in_a_line(error: BaseException) -> str:
    """What a Rust library says, without where in its source it does, and at most SAID characters of it."""
    text = " ".join(str(error).split("\n\nLocation:")[0].split())
    return text if len(text) <= SAID else f"{text[:SAID]}..."


def joined(parts: Sequence[np.ndarray], dtype) -> np.ndarray:
    """All one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype)


def fast_backend(tokenizer: Tokenizer, short: bool = False) -> tuple[Backend | None, str]:
    """The fast encoder that may serve, or None and why there is none. `short`: the texts are."""
    if tokenizer.type == "bytes":
        return None, "bytes need no other"
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        return None, "gigatoken isn't installed (pip install 'megalm[corpus]')"
    reference = Reference(tokenizer)
    proto = tokenizer.files()[0].read_bytes()
    try:
        if tokenizer.type == "huggingface":
            return Gigatoken(lambda: load_hf_json(proto), reference, any_of(getattr(tokenizer, "plain_tokens", [])), short), ""
        content, unsafe = from_sentencepiece(proto)
        return Gigatoken(lambda: load_hf_json(content), reference, unsafe, short), ""
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        return None, f"gigatoken can't take this model: {in_a_line(error)}"


def from_sentencepiece(proto: bytes) -> tuple[bytes, re.Pattern | None]:
    """A sentencepiece BPE model as gigatoken takes it, and what marks a text that it doesn't encode as sentencepiece does.

    gigatoken's own conversion makes tokens of control pieces, so that the text "<s>" becomes one: sentencepiece never does
    that (src/sentencepiece_processor.cc), and takes it for characters. All differences found on real text were of this kind;
    without those tokens there are none. User-defined pieces are matched alike, but gigatoken puts a space in front of
    the text behind one: texts that hold one go to the reference. Raises ValueError for a model that isn't BPE with byte pieces.
    """
    import sentencepiece
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = json.loads(sentencepiece_to_tokenizer_json(proto))
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = range(model.get_piece_size())
    if any(map(model.is_unused, pieces)):
        raise ValueError("it has unused pieces")
    hidden = {model.id_to_piece(i) for i in pieces if model.is_control(i) or model.is_byte(i) or model.is_unknown(i)}
    own = {token["content"] for token in content["added_tokens"] if not token["special"]}  # the user-defined pieces
    spaces = own | {piece.replace("\u2581", " ") for piece in own}
    content["added_tokens"] = []
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair[0] + pair[1] not in hidden]
    return json.dumps(content, ensure_ascii=False).encode(), any_of(spaces)


def any_of(texts: Collection[str]) -> re.Pattern | None:
    """What finds each of them, the longest first; None for none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

