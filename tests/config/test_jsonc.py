"""Comments and trailing commas are accepted, everything else that isn't JSON is refused with its place."""
from __future__ import annotations

import json

import pytest

from megalm.config.errors import ConfigError
from megalm.config.jsonc import parse, strip


@pytest.mark.parametrize("text, value", [
    ('{"a": 1} // end', {"a": 1}),
    ('// first\n{"a": /* inside */ 1}', {"a": 1}),
    ('{"a": [1, 2,], }', {"a": [1, 2]}),
    ('{"a": [1, 2 /* two */ , // last\n], }', {"a": [1, 2]}),
    ('{"url": "http://x/*y*/", "b": "a,]"}', {"url": "http://x/*y*/", "b": "a,]"}),
    (r'{"quote": "\"// no comment,}", "slash": "\\"}', {"quote": '"// no comment,}', "slash": "\\"}),
    ("/* two\nlines */ [1]", [1]),
])
def test_tolerant(text, value):
    assert parse(text, "file") == value


def test_strict_json_is_untouched():
    text = json.dumps({"a": [1, "x // y", {"b": None}], "c": "/* */ ,}"}, indent=2)
    assert strip(text) == text


@pytest.mark.parametrize("text, place", [
    ('{"a": 1\n "b": 2}', "line 2, column 2"),
    ('/* comment\n over lines */ {"a": }', "line 2, column 22"),
    ("[,]", "line 1, column 2"),
    ("[1,,]", "line 1, column 4"),
    ('{"a" 1}', "line 1, column 6"),
    ("", "line 1, column 1"),
    ("[1] 2", "line 1, column 5"),
    ("/* never closed", "line 1, column 1"),
])
def test_syntax_errors_have_their_place(text, place):
    with pytest.raises(ConfigError, match=place) as error:
        parse(text, "c.json")
    assert str(error.value).startswith("c.json: ")


def test_repeated_key_is_an_error():
    with pytest.raises(ConfigError, match='"tp" stands twice in one object, with 2 and 4'):
        parse('{"parallel": {"tp": 2, "tp": 4}}', "c.json")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_json_cannot_hold_is_an_error(word):
    with pytest.raises(ConfigError, match=f"{word} is not a JSON number"):
        parse(f'{{"a": {word}}}', "c.json")


def test_deep_nesting_is_an_error_line():
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse("[" * 200_000, "c.json")
