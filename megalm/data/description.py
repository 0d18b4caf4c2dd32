"""PREFIX.data.json: what a data set was made from. Data sets of other programs have none, and are taken as they are."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from .errors import DataError
from .tokenizer import load_tokenizer

FORMAT = 1


def description_path(prefix: str | Path) -> Path:
    """data/wiki -> data/wiki.data.json (data/wiki.json might be the text)."""
    return Path(f"{prefix}.data.json")


def tokenizer_identity(source) -> dict:
    """Type, path and SHA-256 of the file of a TokenizerSource or a config's tokenizer section; `bytes` has no file."""
    digest = None if source.path is None else hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
    return {"type": source.type, "path": None if source.path is None else str(source.path), "sha256": digest}


def read_description(prefix: str | Path) -> dict | None:
    """The description of a data set; None if it has none. Raises DataError for one that can't be read."""
    path = description_path(prefix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("tokenizer"), dict):
        raise DataError(f"{path} doesn't describe a data set: it names no tokenizer")
    return found


def tokenizer_problems(prefixes: Iterable[str | Path], source) -> list[str]:
    """One line for each data set that was made with another tokenizer than `source`, or with another end of document."""
    ours, problems = tokenizer_identity(source), []
    for prefix in dict.fromkeys(map(str, prefixes)):
        found = read_description(prefix)
        if found is None:
            continue
        theirs = found["tokenizer"]
        if (theirs.get("type"), theirs.get("sha256")) != (ours["type"], ours["sha256"]):
            problems.append(f"data set {prefix} was made with the tokenizer {named(theirs)}, and this is {named(ours)}; "
                            f"tokenize the text anew (if they are the same, remove {description_path(prefix)})")
        elif theirs.get("eod") is not None and (eod := load_tokenizer(source).eod) not in (None, theirs["eod"]):
            problems.append(f"data set {prefix} ends its documents with token {theirs['eod']}, and the tokenizer's end "
                            f"of document is {eod} here; give the tokenizer the eod that the data set was made with")
    return problems


def named(identity: dict) -> str:
    """A tokenizer, for a message."""
    if identity.get("path") is None:
        return str(identity.get("type"))
    return f"{identity['path']} ({identity.get('type')}, SHA-256 {str(identity.get('sha256'))[:12]})"
