"""Every key of the configuration as a Markdown page: `python -m megalm.config.reference > configs/KEYS.md`."""
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .json_schema import json_schema

HEADER = """# Every key

Made by `python -m megalm.config.reference > configs/KEYS.md`. All keys are checked before anything starts, and every mistake is
reported at once, with its path, its value and what would be right.
"""


def page() -> str:
    """The page's text: one table a section, from the JSON Schema."""
    schema = json_schema()
    lines = [HEADER]
    for name, section in schema["properties"].items():
        target = _resolve(schema, section)
        if name == "$schema":
            continue
        lines += [f"## {name}", "", target.get("description", section.get("description", "")), ""]
        rows = list(_rows(schema, target, ""))
        if rows:
            lines += ["| key | default | values | meaning |", "|:--|:--|:--|:--|", *rows, ""]
    return "\n".join(lines)


def _rows(schema: dict[str, Any], section: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, field in section.get("properties", {}).items():
        default = "**required**" if key in section.get("required", []) else _default(field)
        meaning = " ".join(field.get("description", "").split())  # a table's row is a line
        yield f"| {prefix}{key} | {default} | {_values(schema, field)} | {meaning} |"
        for kind, inner in _objects(schema, field):
            yield from _rows(schema, inner, f"{prefix}{key}{kind}.")


def _default(field: dict[str, Any]) -> str:
    return "" if field.get("default") is None else json.dumps(field["default"])


def _values(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """The accepted values in words: a type, an enumeration, bounds."""
    options = field.get("anyOf", field.get("oneOf"))
    if options:
        return " or ".join(dict.fromkeys(_values(schema, option) for option in options if option.get("type") != "null"))
    if "$ref" in field:
        return "object"
    if "const" in field or "enum" in field:
        return ", ".join(map(json.dumps, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        items = field.get("items") or field["prefixItems"][0]
        return f"list of {_values(schema, items)}"
    words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[word]:g}" for word, sign in words.items() if word in field]
    return " ".join([field["type"], " and ".join(bounds)]).strip()


def _objects(schema: dict[str, Any], field: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(mark of a list, the object's schema) of each kind of object that the field holds."""
    if "$ref" in field:
        yield "", _resolve(schema, field)
    if field.get("type") == "array":
        yield from (("[]", inner) for _, inner in _objects(schema, field.get("items", {})))
    for option in field.get("anyOf", []) + field.get("oneOf", []):
        yield from _objects(schema, option)


def _resolve(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field


if __name__ == "__main__":
    print(page(), end="")
