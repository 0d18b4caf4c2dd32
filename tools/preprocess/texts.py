"""Texts from chunks of bytes: JSON parsed, UTF-8 held to one policy, everything else named with its file and line."""
from __future__ import annotations

from dataclasses import dataclass, field

import orjson

from megalm.data.documents import NotUnicode, parse_text
from megalm.data.errors import DataError

from .reading import Chunk

SHOWN = 10  # problems of a unit that are kept in words


@dataclass(frozen=True)
class Policy:
    """What to do with a document that can't be taken as it is."""

    field: str
    encoding_errors: str = "stop"
    skip_invalid: bool = False


@dataclass
class Found:
    """What reading found. `reasons`: {why: [documents, bytes]} of what was left out; bytes as they stand in the file."""

    documents_in: int = 0
    reasons: dict[str, list[int]] = field(default_factory=dict)
    malformed: int = 0  # documents that weren't UTF-8, left out or mended
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def drop(self, why: str, size: int) -> None:
        """Count a document that is left out."""
        entry = self.reasons.setdefault(why, [0, 0])
        entry[0] += 1
        entry[1] += size


def texts_of(chunk: Chunk, policy: Policy, found: Found) -> tuple[list[str], list[int]]:
    """The texts of a chunk, in order, and the place of each in it. Raises DataError for what the policy doesn't leave out."""
    texts, places = [], []
    name, loads, lines = policy.field, orjson.loads, chunk.source.kind == "jsonl"
    for place, raw in enumerate(chunk.raw):
        try:
            text = loads(raw)[name] if lines else plainly(chunk, place, raw)
        except (ValueError, LookupError, TypeError):
            text = None
        if type(text) is str:
            found.documents_in += 1
        else:
            text = slowly(chunk, place, policy, found)
        if text is not None:
            texts.append(text)
            places.append(place)
    return texts, places


def plainly(chunk: Chunk, place: int, raw: bytes | None) -> str:
    if raw is None:
        raise DataError(f"{chunk.where(place)}: null and not a string")
    return raw.decode("utf-8-sig" if chunk.source.kind == "txt" else "utf-8")


def slowly(chunk: Chunk, place: int, policy: Policy, found: Found) -> str | None:
    """The text of a document that the fast way refused; None where it is left out or the line is blank."""
    raw = chunk.raw[place]
    if chunk.source.kind == "jsonl" and not raw.strip():
        return None
    found.documents_in += 1
    try:
        return carefully(chunk, place, raw, policy.field)
    except NotUnicode as error:
        if policy.encoding_errors == "stop" and not policy.skip_invalid:
            raise DataError(f"{error}; --encoding-errors replace or drop goes on") from None
        found.malformed += 1
        found.note(f"{'mended' if policy.encoding_errors == 'replace' else 'skipped'}: {error}")
        if policy.encoding_errors != "replace":
            return found.drop("not UTF-8", len(raw))
    except DataError as error:
        return left_out(error, raw, policy, found)
    try:
        return mended(chunk, place, raw, policy.field)
    except DataError as error:
        found.malformed -= 1
        return left_out(error, raw, policy, found)


def left_out(error: DataError, raw: bytes | None, policy: Policy, found: Found) -> None:
    if not policy.skip_invalid:
        raise DataError(f"{error}; --skip-invalid leaves such documents out") from None
    found.note(f"skipped: {error}")
    found.drop("invalid", len(raw or b""))


def carefully(chunk: Chunk, place: int, raw: bytes | None, name: str) -> str:
    """The text, by the standard library's parser, which takes more and says more. Raises DataError; NotUnicode for bad UTF-8."""
    where = chunk.where(place)
    if chunk.source.kind != "jsonl":
        try:
            return plainly(chunk, place, raw)
        except UnicodeDecodeError as error:
            raise NotUnicode(f"{where}: not UTF-8 at byte {error.start}") from None
    return parse_text(raw, where, name)


def mended(chunk: Chunk, place: int, raw: bytes, name: str) -> str:
    """The text with U+FFFD for every maximal bad part, as the WHATWG and Unicode's chapter 3.9 have it, and for half a pair."""
    if chunk.source.kind != "jsonl":
        return raw.decode("utf-8-sig" if chunk.source.kind == "txt" else "utf-8", "replace")
    whole = raw.decode("utf-8-sig", "replace").encode()
    text = parse_text(whole, chunk.where(place), name, surrogates=True)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
