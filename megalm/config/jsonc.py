"""JSON as people write it: // and /* */ comments and trailing commas, everything else as RFC 8259 has it.

Comments and commas are replaced by spaces, so that the line and column of a syntax error are those of the file.
"""
from __future__ import annotations

import json
import re
from typing import Any

from .errors import ConfigError

_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(_STRING + r"|,(?=\s*[}\]])")


def strip(text: str) -> str:
    """The same text as strict JSON, every other character in its place."""
    text = _COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else re.sub(r"[^\n]", " ", match[0]), text)

    def comma(match: re.Match) -> str:
        if match[0] != ",":
            return match[0]
        # "[,]" and "{,}" have no value before the comma: leave it for the parser to refuse.
        return "," if text[:match.start()].rstrip()[-1:] in ("", ",", "[", "{", ":") else " "

    return _TRAILING_COMMA.sub(comma, text)


def parse(text: str, name: str) -> Any:
    """The value of a text named `name` in errors.

    Raises ConfigError on a syntax error (with line and column), a key given twice in one object, NaN or Infinity.
    """
    problems: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                problems.append(f"{name}: key {json.dumps(key)} stands twice in one object, "
                                f"with {json.dumps(seen[key])} and {json.dumps(value)}")
            seen[key] = value
        return seen

    def constant(word: str) -> None:
        problems.append(f"{name}: {word} is not a JSON number")

    try:
        value = json.loads(strip(text), object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{name}: line {error.lineno}, column {error.colno}: {error.msg}"]) from None
    except RecursionError:
        raise ConfigError([f"{name}: nested too deeply"]) from None
    if problems:
        raise ConfigError(problems)
    return value
