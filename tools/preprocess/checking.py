"""May the fast tokenizer be used? Only if its ids are the reference's on a sample of this corpus, its strangest documents too."""
from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megalm.data.errors import DataError
from megalm.data.tokenizer import Tokenizer

from .backends import Backend, Reference
from .inputs import Source, Span, Unit
from .reading import Chunk, read_chunks
from .texts import Found, Policy, texts_of

PLACES = 64  # of the corpus that are looked into, evenly apart
PLACE_BYTES = 1 << 18
LEAST_BYTES, MOST_BYTES = 2_000_000, 6_000_000  # of text in the sample: at most three seconds of a slow reference
BATCH = 64
ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\uffff]|\s{20}|\S{200}")
MARKER = re.compile(r"<[|/]?\w+[|]?>")
RARE = ("Cn", "Co", "Cf", "Cc", "Mn", "Lo")
STRANGE = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "\r\n\r\n", " \n \n", "\0", "a\0b", "".join(map(chr, range(1, 32))), "\x7f\x80\x9f",
    "\u0378\u0379", "\U000e0001\U000e0041", "\U0010ffff\ufffe\uffff", "\ud7ff\ue000\uf8ff", "\ufffd\ufffd", "\ufeffmark",
    "e\u0301\u0302\u0303" * 9, "\u00a0\u2003\u3000\u2028\u2029\u0085x", "a" * 30_000, "ab" * 15_000, " " * 30_000, "\n" * 5_000,
    "=" * 999, "- " * 999, "\u2581\u2581 \u2581", "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea" * 40,
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002" * 400, "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 " * 200,
    "x = {'a': [1, 2.5e-3], \"b\": None}\n\tif x:\n\t\treturn  1\n" * 20, "1234567890" * 30, "don't WE'LL I'M they've \u2019s 'S",
    "<|>", "<s", "</ s>", "<0x0A><0xFF>", "\ufb01 \u2460 \u212b \u1e9b\u0323 \uac00 \u1100\u1161",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
]


@dataclass(frozen=True)
class Sample:
    """A document, and the chunk that it is from if it is from the corpus."""

    text: str
    chunk: Chunk | None = None
    place: int = 0

    def where(self) -> str:
        """For a message."""
        return f"the test document {self.text[:40]!r}" if self.chunk is None else self.chunk.where(self.place)


def markers(tokenizer: Tokenizer) -> list[str]:
    """The texts that a tokenizer may take for tokens of their own, or may not."""
    if tokenizer.type == "huggingface":
        return [token["content"] for token in json.loads(tokenizer.files()[0].read_bytes()).get("added_tokens", [])][:400]
    if tokenizer.type == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files()[0].read_bytes())
        pieces = map(model.id_to_piece, range(model.get_piece_size()))
        return [piece for piece in pieces if re.fullmatch(r"[<\[].*[>\]]", piece)][:400]
    return []


def strange_samples(tokenizer: Tokenizer) -> list[Sample]:
    """Documents that no corpus may have, and some will."""
    texts = list(STRANGE)
    for marker in markers(tokenizer):
        texts += [marker, f"a{marker}b", f" {marker} x {marker}{marker}\n", marker[:-1]]
    return [Sample(text) for text in texts]


def corpus_samples(sources: Sequence[Source], units: Sequence[Unit], policy: Policy, count: int) -> list[Sample]:
    """At most `count` documents from all over the corpus: the longest, the strangest, and others."""
    pool = list(gather(sources, units, policy))
    if not pool:
        return []
    by_length = sorted(range(len(pool)), key=lambda i: -len(pool[i].text))
    by_oddity = sorted(range(len(pool)), key=lambda i: -oddity(pool[i].text))
    evenly = [int(i) for i in np.linspace(0, len(pool) - 1, min(2 * count, len(pool)))]
    chosen: dict[int, None] = {}
    size = min(MOST_BYTES, max(LEAST_BYTES, sum(source.size for source in sources) // 100))
    for order, share in ((by_length, 0.25), (by_oddity, 0.25), (evenly, 0.5)):
        take(order, pool, chosen, count * share + 1, size * share)
    return [pool[place] for place in sorted(chosen)]


def take(order: Sequence[int], pool: Sequence[Sample], chosen: dict[int, None], count: float, size: float) -> None:
    """Choose so many more, so large together; where large ones would leave no room for the others, those are passed over."""
    for place in order:
        if place in chosen:
            continue
        text = len(pool[place].text)
        if count < 1:
            return
        if text <= max(4 * size / count, 1000):
            chosen[place] = None
            count, size = count - 1, size - text


def gather(sources: Sequence[Source], units: Sequence[Unit], policy: Policy) -> Iterator[Sample]:
    """The documents at PLACES places, a chunk of each. What can't be read is left to the run itself, which says so."""
    everything = [span for unit in units for span in unit]
    weights = np.cumsum([0, *(span.weight for span in everything)])
    lenient = replace(policy, encoding_errors="drop", skip_invalid=True)
    wanted: dict[Span, None] = {}
    for target in np.linspace(0, weights[-1], PLACES, endpoint=False):
        number = int(np.searchsorted(weights, target, "right")) - 1
        span = everything[number]
        if sources[span.source].by_bytes:
            start = int(span.start + target - weights[number])
            span = replace(span, start=start, end=min(span.end, start + PLACE_BYTES))
        wanted[span] = None
    for span in wanted:
        try:
            chunk = next(read_chunks(sources[span.source], span, policy.field), None)
        except (DataError, OSError):
            continue
        if chunk is not None:
            texts, places = texts_of(chunk, lenient, Found())
            yield from (Sample(text, chunk, place) for text, place in zip(texts, places, strict=True))


def oddity(text: str) -> int:
    """How much there is of what tokenizers differ about: control characters, unassigned code points, long runs and words."""
    head = text[:8000]
    rare = sum(unicodedata.category(letter) in RARE for letter in set(head) if letter > "~")
    return rare + 10 * len(ODD.findall(head)) + 5 * len(MARKER.findall(head))


def first_difference(samples: Sequence[Sample], fast: Backend, reference: Reference) -> str | None:
    """Where the two give other ids, in words; None if nowhere."""
    for low in range(0, len(samples), BATCH):
        batch = samples[low:low + BATCH]
        texts = [sample.text for sample in batch]
        (ours, our_lengths), (right, right_lengths) = fast(texts), reference(texts)
        if np.array_equal(ours, right) and np.array_equal(our_lengths, right_lengths):
            continue
        pairs = zip(np.split(ours, np.cumsum(our_lengths)[:-1]), np.split(right, np.cumsum(right_lengths)[:-1]), strict=True)
        for sample, (a, b) in zip(batch, pairs, strict=True):
            if not np.array_equal(a, b):
                shorter = min(len(a), len(b))
                unequal = np.flatnonzero(a[:shorter] != b[:shorter])
                return f"{sample.where()}, from token {int(unequal[0]) if len(unequal) else shorter} on"
    return None
