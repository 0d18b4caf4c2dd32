"""From pydantic's errors to lines that say where, what was given and what would be right."""
from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from . import schema
from .schema import Config

_EXPECTED = {
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number", "bool_type": "true or false",
    "string_type": "a string", "tuple_type": "a list", "model_type": "an object", "dict_type": "an object",
    "greater_than": "a value greater than {gt:g}", "greater_than_equal": "a value of at least {ge:g}",
    "less_than": "a value less than {lt:g}", "less_than_equal": "a value of at most {le:g}",
    "finite_number": "a finite number", "string_too_short": "a text that is not empty", "literal_error": "{expected}",
    "too_short": "at least {min_length} item(s)", "too_long": "at most {max_length} items",
    "union_tag_invalid": "a type out of {expected_tags}", "union_tag_not_found": 'a "type"',
}


def explain(error: ValidationError, tree: Any) -> dict[str, str]:
    """Dotted path -> one line, for every mistake pydantic found in `tree`. Two lines about one path become one."""
    expected: dict[str, list[str]] = {}
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = real_path(item["loc"], tree, item["type"])
        dotted = ".".join(map(str, path))
        if item["type"] == "missing" and isinstance(item["loc"][-1], int):
            lines[".".join(map(str, path[:-1]))] = f"{dotted}: missing, the list is too short: {short(item['input'])}"
        elif item["type"] == "missing":
            lines[dotted] = f"{dotted}: missing, it has no default"
        elif item["type"] == "extra_forbidden":
            lines[dotted] = f"{dotted}: unknown key (value {short(item['input'])}){nearest(path)}"
        else:
            wanted = _EXPECTED.get(item["type"], item["msg"]).format(**item.get("ctx", {}))
            if item["type"] == "model_type":
                wanted += f" with {keys_of(item['ctx']['class_name'])}"
            expected.setdefault(dotted, []).append(wanted)
            lines[dotted] = f"{dotted}: {' or '.join(expected[dotted])} expected, {short(value_at(tree, path))} given"
    # A list whose items are wrong counts as empty: the items' own lines say it better.
    return {path: line for path, line in lines.items()
            if "item(s) expected" not in line or not any(other.startswith(path + ".") for other in lines)}


def keys_of(section: str, most: int = 6) -> str:
    """The keys of a class of the schema, for a message; those that have no default first."""
    found = getattr(schema, section).model_fields
    names = [found[name].alias or name for name in sorted(found, key=lambda name: not found[name].is_required())]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def real_path(loc: Sequence[str | int], tree: Any, kind: str) -> tuple[str | int, ...]:
    """pydantic's location without the names of union branches, which are not in the file."""
    path: list[str | int] = []
    for place, part in enumerate(loc):
        last_of_missing = kind == "missing" and place == len(loc) - 1
        if isinstance(tree, dict) and (part in tree or last_of_missing):
            tree = tree.get(part)
        elif isinstance(tree, (list, tuple)) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def value_at(tree: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def short(value: Any) -> str:
    """The value as JSON, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(path: Sequence[str | int]) -> str:
    """The known key that was probably meant: of the same section, else of another one; else the section's keys."""
    names = [part for part in path if isinstance(part, str)]
    section, leaf = ".".join(names[:-1]), names[-1]
    known = known_keys()
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {'.'.join(map(str, path[:-1] + (close[0],)))}?"
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    elsewhere = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    if elsewhere:
        return f"; did you mean {by_leaf[elsewhere[0]]}?"
    return f"; known keys{' of ' + section if section else ''}: {', '.join(siblings)}"


@lru_cache(maxsize=1)
def known_keys() -> tuple[str, ...]:
    """Dotted paths of all keys, list places left out: data.train.weight."""
    return tuple(_keys(Config, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        yield path
        for inner in _models(field.annotation):
            yield from (key for key in _keys(inner, path + "."))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
