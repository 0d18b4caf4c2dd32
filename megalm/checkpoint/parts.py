"""One rank's part of a checkpoint: its tensors, hashed on their way to the disk, and the index that says what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megalm.checkpoint import sealed
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import FORMAT, VERSION, StoredFragment, arrange, index_file, rank_file

Content = Callable[[int], memoryview | Iterator[memoryview]]
"""The bytes of the tensor of the entry with this number, whole or one stretch after the other; asked for once."""


def write_part(folder: Path, rank: int, entries: Sequence[StoredFragment], content: Content, disk: Disk) -> None:
    """Write the tensors, then the index, which is there only once all of them are on the disk. Raises OSError."""
    begin, placed = arrange(entries)
    number = {entry.key: index for index, entry in enumerate(entries)}
    hashes: dict[str, list[str]] = {entry.key: [] for entry in placed}
    size = disk.write(folder / rank_file(rank), _chunks(begin, placed, lambda key: content(number[key]), hashes))
    fragments = [dataclasses.replace(entry, xxh3=tuple(hashes[entry.key])).to_json() for entry in placed]
    index = {"format": FORMAT, "version": VERSION, "rank": rank, "file": rank_file(rank), "bytes": size,
             "header_bytes": len(begin), "header_xxh3": sealed.digest(begin), "block_bytes": sealed.BLOCK_BYTES,
             "fragments": fragments}
    disk.write(folder / index_file(rank), [sealed.seal(index)])


def _chunks(begin: bytes, placed: Iterable[StoredFragment], content_of: Callable[[str], memoryview | Iterator[memoryview]],
            hashes: dict[str, list[str]]) -> Iterator[bytes | memoryview]:
    yield begin
    for entry in placed:
        content = content_of(entry.key)
        for block in sealed.blocks(content) if isinstance(content, memoryview) else sealed.blocks_of_stream(content):
            hashes[entry.key].append(sealed.digest(block))
            yield block
