"""Small data sets for the tests of this folder."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from megalm.data.indexed import IndexedWriter


def write(prefix: Path, documents, dtype=np.uint16, **options) -> Path:
    """A data set of these documents, one sequence each."""
    with IndexedWriter(prefix, dtype, **options) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def numbered(prefix: Path, lengths, start: int = 0, dtype=np.int32) -> Path:
    """Documents of these lengths whose tokens are start, start + 1, ...: every token tells where it came from."""
    ends = start + np.cumsum([0, *lengths])
    return write(prefix, [np.arange(low, high) for low, high in zip(ends, ends[1:], strict=False)], dtype)
