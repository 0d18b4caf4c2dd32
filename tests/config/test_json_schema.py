"""The committed schema file is the one the code makes, and says what the code accepts."""
from __future__ import annotations

from megalm.config.explain import known_keys
from megalm.config.json_schema import FILE, json_schema, text


def test_file_is_current():
    assert FILE.read_text() == text(), "run: python -m megalm.config.json_schema"


def test_every_key_is_in_it():
    schema = json_schema()

    def properties(node):
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        inner = [properties(option) for option in node.get("anyOf", []) + node.get("oneOf", [])] + [
            properties(node[key]) for key in ("items",) if key in node]
        return {**node.get("properties", {}), **{key: value for one in inner for key, value in one.items()}}

    for key in known_keys():
        node = schema
        for part in key.split("."):
            assert part in properties(node), key
            node = properties(node)[part]


def test_dollar_schema_is_a_key_and_others_are_not():
    schema = json_schema()
    assert "$schema" in schema["properties"]
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "batch", "optimizer", "tokenizer", "data", "train"}
