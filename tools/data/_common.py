"""What the commands share: opening inputs, refusing outputs, and publishing all outputs or none."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader, file_paths
from megalm.data.rewrite import Rewritten


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
    return f"{reader.num_documents:,} documents, {reader.total_tokens:,} tokens ({reader.dtype.name})"


def published(prefix: str) -> IndexedReader:
    """An output, read again: the .idx is checked as a whole before anybody is told that it is there."""
    return IndexedReader(Path(prefix), multimodal=True)
