"""The text in a line of JSON, and what is wrong with a line, in words."""
from __future__ import annotations

import pytest

from megalm.data.documents import parse_text
from megalm.data.errors import DataError


@pytest.mark.parametrize("line, text", [
    (b'\xef\xbb\xbf{"text": "one\\nline"}\r\n', "one\nline"),
    (b'{"body": 3, "text": "\\u00e9\\ud83d\\ude00\\u2028x"}\n', "é😀\u2028x"),
    (b'{"text": ""}', "")])
def test_line(line, text):
    assert parse_text(line, "here", "text") == text


@pytest.mark.parametrize("line, message", [
    (b'{"text": "a"', r"a.jsonl, line 2: not JSON: Expecting ',' delimiter at character 13"),
    (b"nonsense", "line 2: not JSON: Expecting value at character 1"),
    (b'{"text": "a"} x', "line 2: not JSON: Extra data at character 15"),
    (b'{"text": "\xff"}', "line 2: not UTF-8 at byte 10 of the line"),
    (b"[1]", "line 2: a JSON array and not an object with the field 'text'"),
    (b'{"txt": "a", "b": 1}', "line 2: no field 'text'; it has 'txt', 'b'"),
    (b"{}", "line 2: no field 'text'; it has none"),
    (b'{"text": null}', "line 2: the field 'text' is a JSON null and not a string"),
    (b'{"text": "\\ud83d"}', "line 2: half a surrogate pair, .*ud83d"),
    (b'{"text": ' + b"[" * 100_000, "line 2: not JSON that can be read"),
])
def test_invalid_line(line, message):
    with pytest.raises(DataError, match=message) as error:
        parse_text(line + b"\n", "a.jsonl, line 2", "text")
    assert "\n" not in str(error.value)
