"""May the fast tokenizer be used? Only if its ids are the reference's on a sample of this corpus, its strangest documents too."""
from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import numpy as np

from megalm.data.errors import DataError
from megalm.data.tokenizer import Tokenizer

from .backends import Backend, Reference
from .inputs import Source, Span, Unit
from .reading import Chunk, read_chunks
from .texts import Found, Policy, texts_of

PLACES = 64  # of the corpus that are looked into, evenly apart
PLACE_BYTES = 1 << 18
DEEP = 64  # chunks of a compressed file or of row groups that are looked through: what is behind them is never seen
LONGEST = 250_000  # characters: of a longer document its parts stand for it
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
    """A document, and where it is if it is from the corpus: a chunk without its bytes that begins with it."""

    text: str
    chunk: Chunk | None = None
    parts: bool = False  # its head, middle and tail alone

    def where(self) -> str:
        """For a message."""
        found = f"the test document {self.text[:40]!r}" if self.chunk is None else self.chunk.where(0)
        return f"parts of {found}" if self.parts else found

    def within(self, size: int) -> Sample:
        """At most so many characters of it, a third of them from its head, its middle and its tail each."""
        if len(self.text) <= size:
            return self
        third, middle = max(1, size // 3), (len(self.text) - size // 3) // 2
        return replace(self, text=self.text[:third] + self.text[middle:middle + third] + self.text[-third:], parts=True)


def markers(tokenizer: Tokenizer) -> list[str]:
    """The texts that a tokenizer may take for tokens of their own, or may not."""
    if tokenizer.type == "huggingface":
        return tokenizer.added_tokens[:400]
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
    evenly = [int(i) for points in (count // 2 + 1, 2 * count) for i in np.linspace(0, len(pool) - 1, points)]
    chosen: dict[int, Sample] = {}
    size = min(MOST_BYTES, max(LEAST_BYTES, sum(source.size for source in sources) // 100))
    for order, share in ((by_length, 0.25), (by_oddity, 0.25), (evenly, 0.5)):
        take(order, pool, chosen, round(count * share + 1), size * share, order is by_length)
    return [chosen[place] for place in sorted(chosen)]


def take(order: Sequence[int], pool: Sequence[Sample], chosen: dict[int, Sample], count: int, size: float, long: bool) -> None:
    """Choose so many more, so large together; parts stand for those that would leave no room for the others.

    `long`: each may have half of the room that is left; else four times its share.
    """
    for place in order:
        if count < 1 or size < 1:
            return
        if place not in chosen:
            chosen[place] = pool[place].within(int(max(size / 2 if long else 4 * size / count, 1000)))
            count, size = count - 1, size - len(chosen[place].text)


def gather(sources: Sequence[Source], units: Sequence[Unit], policy: Policy) -> Iterator[Sample]:
    """The documents at PLACES places, a chunk of each. What can't be read is left to the run itself, which says so."""
    everything = [span for unit in units for span in unit]
    weights = np.cumsum([0, *(span.weight for span in everything)])
    if not weights[-1]:
        return
    lenient = replace(policy, encoding_errors="drop", skip_invalid=True)
    wanted: Counter[Span] = Counter()
    seen: Counter[int] = Counter()  # bytes of each source: of a small corpus the places touch
    for target in np.linspace(0, weights[-1], PLACES, endpoint=False):
        number = int(np.searchsorted(weights, target, "right")) - 1
        span = everything[number]
        if sources[span.source].by_bytes:
            start = int(span.start + target - weights[number])
            end = min(sources[span.source].size, start + PLACE_BYTES)
            span = replace(span, start=max(start, seen[span.source]), end=end)
            seen[span.source] = end
        wanted[span] += 1
    for span, chunks in wanted.items():
        try:
            found = read_chunks(sources[span.source], span, policy.field, PLACE_BYTES)
            for chunk in islice(found, 0, DEEP if chunks > 1 else 1, max(1, DEEP // chunks)):
                yield from samples_of(chunk, lenient)
        except (DataError, OSError):
            continue


def samples_of(chunk: Chunk, policy: Policy) -> Iterator[Sample]:
    """The documents of a chunk; neither its bytes nor very long texts are held on to."""
    rows = chunk.source.kind == "parquet"
    offsets = list(accumulate((1 if rows else len(raw) + 1 for raw in chunk.raw), initial=chunk.first))
    for text, place in zip(*texts_of(chunk, policy, Found()), strict=True):
        yield Sample(text, Chunk(chunk.source, [], offsets[place])).within(LONGEST)


def oddity(text: str) -> int:
    """How much there is of what tokenizers differ about: control characters, unassigned code points, long runs and words."""
    head = text[:8000]
    rare = sum(unicodedata.category(letter) in RARE for letter in set(head) if letter > "~")
    return rare + 10 * len(ODD.findall(head)) + 5 * len(MARKER.findall(head))


def in_shares(samples: Sequence[Sample], count: int) -> Iterator[list[Sample]]:
    """The samples, in their order, in at most about so many shares of about as much text each."""
    most = sum(len(sample.text) for sample in samples) // count
    share: list[Sample] = []
    size = 0
    for sample in samples:
        share.append(sample)
        size += len(sample.text)
        if size > most:
            yield share
            share, size = [], 0
    if share:
        yield share


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
