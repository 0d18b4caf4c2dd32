"""Documents from files: .jsonl (one JSON object a line, the text in one field) and .txt (each file is one document)."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import DataError

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 4096
JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".text")


@dataclass
class Batch:
    """Some documents of one file, still as bytes: what a worker is handed. `lines` holds the number of each, from 1."""

    path: str
    json_lines: bool
    documents: list[bytes] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    size: int = 0  # bytes of text

    def add(self, line: int, document: bytes) -> None:
        self.documents.append(document)
        self.lines.append(line)
        self.size += len(document)

    @property
    def full(self) -> bool:
        return self.size >= BATCH_BYTES or len(self.documents) >= BATCH_DOCUMENTS


def check_inputs(paths: Sequence[str]) -> int:
    """The size of all input files, bytes. Raises DataError for a missing file, a folder, or a suffix that isn't known."""
    size = 0
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise DataError(f"input {name} is missing")
        if path.is_dir():
            raise DataError(f"input {name} is a folder; name its files")
        if path.suffix not in JSON_LINES + PLAIN:
            raise DataError(f"input {name}: the suffix {path.suffix!r} isn't known; use .jsonl (one JSON object a line) or .txt")
        size += path.stat().st_size
    return size


def read_batches(paths: Sequence[str]) -> Iterator[Batch]:
    """The documents of the files, in order, in batches of about a megabyte; blank lines are left out."""
    for name in paths:
        if Path(name).suffix in PLAIN:
            batch = Batch(name, json_lines=False)
            batch.add(1, Path(name).read_bytes())
            yield batch
            continue
        batch = Batch(name, json_lines=True)
        with open(name, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                batch.add(number, line)
                if batch.full:
                    yield batch
                    batch = Batch(name, json_lines=True)
        if batch.documents:
            yield batch


def json_type(value) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names[type(value)]


def read_text(batch: Batch, place: int, field_name: str) -> str:
    """The text of one document of a batch. Raises DataError, with file and line, if there is none."""
    raw = batch.documents[place]
    if not batch.json_lines:
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{batch.path}: not UTF-8 at byte {error.start}") from error
    return parse_text(raw, f"{batch.path}, line {batch.lines[place]}", field_name)


class NotUnicode(DataError):
    """Bytes that aren't UTF-8, or half a surrogate pair."""


def parse_text(raw: bytes, where: str, field_name: str, *, surrogates: bool = False) -> str:
    """The text in a line of JSON. Raises DataError, which begins with `where`, if there is none.

    `surrogates`: half a surrogate pair stays in the text; else it is an error, as UTF-8 has nothing for it.
    """
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NotUnicode(f"{where}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON that can be read: nested too deeply") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {json_type(value)} and not an object with the field {field_name!r}")
    if field_name not in value:
        raise DataError(f"{where}: no field {field_name!r}; it has {', '.join(map(repr, list(value)[:8])) or 'none'}")
    text = value[field_name]
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {field_name!r} is a JSON {json_type(text)} and not a string")
    try:
        if not surrogates:
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotUnicode(f"{where}: half a surrogate pair, {text[error.start]!r}, which isn't text") from error
    return text
