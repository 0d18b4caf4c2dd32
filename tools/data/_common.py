"""What the commands share: opening inputs, refusing outputs, and publishing all outputs or none."""
from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import megalm
from megalm.data.description import FORMAT, named, read_description
from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader, file_paths
from megalm.data.rewrite import Rewritten
from megalm.tools._command import counted


def open_all(prefixes: Sequence[str]) -> list[IndexedReader]:
    """The data sets. Raises DataError for all that can't be read, at once."""
    readers, problems = [], []
    for prefix in prefixes:
        try:
            readers.append(IndexedReader(prefix, multimodal=True))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return readers


def refuse_outputs(outputs: Sequence[str], inputs: Sequence[str], overwrite: bool) -> None:
    """Raises DataError if an output is an input, or exists and may not be replaced."""
    read = {path.resolve() for prefix in inputs for path in file_paths(prefix)}
    for output in outputs:
        for path in file_paths(output):
            if path.resolve() in read:
                raise DataError(f"{output} is read and can't be written as well; give another --output")
            if path.exists() and not overwrite:
                raise DataError(f"{path} exists already; it is replaced only with --overwrite")


Parents = list[tuple[IndexedReader, dict]]


def parents_of(readers: Sequence[IndexedReader]) -> Parents | None:
    """Each data set with its PREFIX.data.json; None if one has none: said, if others have one, as it is lost.

    Raises DataError if two name different tokenizers or ends of document.
    """
    found = [(reader, read_description(reader.prefix)) for reader in readers]
    known = [(reader, description) for reader, description in found if description is not None]
    for reader, description in known[1:]:
        first, tokenizer = known[0][1]["tokenizer"], description["tokenizer"]
        if (first.get("type"), first.get("sha256")) != (tokenizer.get("type"), tokenizer.get("sha256")):
            raise DataError(f"{known[0][0].prefix} was made with the tokenizer {named(first)} and {reader.prefix} with "
                            f"{named(tokenizer)}: their ids don't mean the same; tokenize one of them again")
        if None not in (first.get("eod"), tokenizer.get("eod")) and first["eod"] != tokenizer["eod"]:
            raise DataError(f"{known[0][0].prefix} ends its documents with token {first['eod']} and {reader.prefix} with "
                            f"{tokenizer['eod']}; tokenize one of them again")
    if len(known) == len(found):
        return known
    if known:
        bare = ", ".join(str(reader.prefix) for reader, description in found if description is None)
        print(f"no .data.json is written, as there is none of {bare}: training won't notice the wrong tokenizer", file=sys.stderr)
    return None


def inherited(parents: Parents, counts: dict, **how) -> bytes:
    """The PREFIX.data.json of a data set made from others: their tokenizer and sources, its own counts, and how it was made."""
    first, sources = parents[0][1], []
    for _, description in parents:
        sources += [source for source in description.get("sources", []) if source not in sources]
    found = {"format": FORMAT, "megalm": megalm.__version__, "tokenizer": first["tokenizer"], "dtype": parents[0][0].dtype.name,
             **counts, "sources": sources, "made_from": [reader.prefix for reader, _ in parents], **how}
    if all(description.get("options") == first.get("options") for _, description in parents) and "options" in first:
        found["options"] = first["options"]
    return json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n"


@contextlib.contextmanager
def writing(prefixes: Sequence[str]) -> Iterator[list[Rewritten]]:
    """The outputs under construction: all are published when the block ends well, none otherwise."""
    outputs: list[Rewritten] = []
    try:
        for prefix in prefixes:
            outputs.append(Rewritten(prefix))
        yield outputs
        for output in outputs:  # all are on the disk before the first appears
            output.sync()
        for output in outputs:
            output.publish()
    except OSError as error:
        raise DataError(f"{error.filename or prefixes[0]}: {error.strerror}; nothing was written") from error
    finally:
        for output in outputs:
            output.discard()


def described(reader: IndexedReader) -> str:
    """`12 documents, 345 tokens (uint16)`."""
    return f"{counted(reader.num_documents, 'document')}, {counted(reader.total_tokens, 'token')} ({reader.dtype.name})"


def published(prefix: str) -> IndexedReader:
    """An output, read again: the .idx is checked as a whole before anybody is told that it is there."""
    return IndexedReader(Path(prefix), multimodal=True)
