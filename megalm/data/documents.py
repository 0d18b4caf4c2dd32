"""The text in a line of JSON (one object a line, the text in one field), and what is wrong with a line, in words."""
from __future__ import annotations

import json

from .errors import DataError


def json_type(value) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names[type(value)]


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
