"""From a JSON file and command-line overrides to a Config, or one error with every mistake in it."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import jsonc
from .checks import find_problems
from .errors import ConfigError
from .explain import explain, short
from .schema import Config

# Stands in for required keys that are missing or wrong, so that the other keys can still be checked against each other.
_STAND_IN = {
    "model": {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1, "seq_length": 1},
    "batch": {"micro": 1, "global": 1}, "optimizer": {"lr": 1.0}, "tokenizer": {"type": "bytes"},
    "data": {"train": [{"path": "-"}]}, "train": {"dir": "-", "steps": 1},
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override (`section.key=value`, the value parsed as JSON, else taken as a string), validate.

    Raises ConfigError with all problems at once, each with its dotted path and value.
    """
    tree = read(path)
    problems = apply_overrides(tree, overrides)
    config, more = check(tree)
    if config is None or problems or more:
        raise ConfigError(problems + more)
    return config


def read(path: str | Path) -> dict[str, Any]:
    """The file's object, comments and trailing commas accepted. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    tree = jsonc.parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: an object {{...}} expected, {short(tree)} given"])
    return tree


def validate(tree: dict[str, Any]) -> Config:
    """A Config from a tree as JSON gives it. Raises ConfigError with all problems at once."""
    config, problems = check(tree)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def check(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """(config, problems). The config is None or built on stand-ins where there are problems."""
    tree = {key: value for key, value in tree.items() if key != "$schema"}
    wrong: dict[str, str] = {}
    try:
        config: Config | None = Config.model_validate(tree)
    except ValidationError as error:
        wrong = explain(error, tree)
        config = _without(tree, wrong)
    problems = list(wrong.values())
    if config is not None:
        problems += [problem.message for problem in find_problems(config)
                     if not any(_overlap(key, path) for key in problem.keys for path in wrong)]
    return config, problems


def _without(tree: dict[str, Any], wrong: dict[str, str]) -> Config | None:
    """The Config of all keys that are right by themselves, stand-ins for the required others."""
    tree = copy.deepcopy(tree)
    for path in wrong:
        section, _, rest = path.partition(".")
        key = rest.partition(".")[0]
        if key and isinstance(tree.get(section), dict):
            tree[section].pop(key, None)
        else:
            tree.pop(section, None)
    for section, required in _STAND_IN.items():
        tree[section] = {**required, **tree.get(section, {})}
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write each `section.key=value` into the tree; the problems of those that have no place."""
    problems = []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        parts = dotted.split(".")
        if not equals or not all(parts):
            problems.append(f"{text}: an override reads section.key=value")
            continue
        try:
            _put(tree, parts, _parse_value(value))
        except _NoPlace as error:
            problems.append(f"{text}: {error}")
    return problems


class _NoPlace(Exception):
    """An override's path leads through something that isn't an object or list."""


def _put(tree: Any, parts: list[str], value: Any) -> None:
    for place, part in enumerate(parts):
        where, last = ".".join(parts[:place]), place == len(parts) - 1
        key: Any = part
        if isinstance(tree, list):
            if not part.isdigit() or int(part) >= len(tree):
                raise _NoPlace(f"{where} is a list of {len(tree)}; {part} is no place in it")
            key = int(part)
        elif not isinstance(tree, dict):
            raise _NoPlace(f"{where} is {short(tree)}, it has no key {part}")
        if last:
            tree[key] = value
        else:
            if isinstance(tree, dict) and tree.get(key) is None:
                tree[key] = {}
            tree = tree[key]


def _parse_value(text: str) -> Any:
    try:
        return jsonc.parse(text, text)
    except ConfigError:
        return text
