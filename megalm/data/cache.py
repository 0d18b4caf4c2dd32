"""Arrays kept on disk between runs and mapped by every process: one checked file, which a part of can't be taken for.

Layout: magic (8 bytes), header length u64, CRC-32 of the header u32, header (JSON: key, arrays with dtype, shape, offset
and CRC-32, size of the whole file), padding, then each array at a multiple of 64 bytes.
"""
from __future__ import annotations

import hashlib
import json
import logging
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .errors import DataError
from .publish import write_atomically

MAGIC = b"MEGALMI1"
PREAMBLE = struct.Struct("<8sQI")
ALIGNMENT = 64
FOLDER = "index_cache"

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


class Unusable(Exception):
    """A cache file that isn't there, isn't whole or holds something else; says which. It is built again."""


def cache_folder(cache: str | Path | None, prefixes: Sequence[str | Path], fallback: str | Path) -> Path:
    """The folder for the index files: `cache` if the user names one, else index_cache/ beside the first data set if that can be
    written, else index_cache/ in `fallback` (the run's folder). It exists when this returns.

    Raises DataError if it can't be written.
    """
    if cache is not None:
        candidates = [Path(cache)]
    else:
        candidates = [Path(prefixes[0]).parent / FOLDER, Path(fallback) / FOLDER]
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            reason = error.strerror
    raise DataError(f"data.cache: the sample index can't be written to {candidates[-1]}: {reason}")


def cached(folder: Path | None, name: str, description: Mapping, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `build()`, from the file <name>-<hash of description>.index in `folder` or written there for the next time.

    The description is everything the arrays depend on. A file that isn't whole is replaced, with a line in the log. With
    no folder the arrays stay in memory. Raises DataError if the file can't be written.
    """
    if folder is None:
        return build()
    key = json.dumps(description, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.index"
    try:
        return read_arrays(path, key)
    except FileNotFoundError:
        pass
    except Unusable as reason:
        log.warning("%s: %s; it is built again", path, reason)
    arrays = build()
    try:
        write_atomically(path, _chunks(key, arrays))
        return read_arrays(path, key)
    except OSError as error:
        raise DataError(f"{path}: the sample index can't be written: {error.strerror}") from error


def read_arrays(path: Path, key: str) -> Arrays:
    """The arrays of a cache file, mapped read-only. Raises Unusable unless every byte is what was written under this key."""
    size = path.stat().st_size
    if size < PREAMBLE.size:
        raise Unusable(f"{size} bytes are no header")
    raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    magic, length, checksum = PREAMBLE.unpack(raw[:PREAMBLE.size].tobytes())
    if magic != MAGIC or length > size - PREAMBLE.size:
        raise Unusable("not a whole index file")
    text = raw[PREAMBLE.size:PREAMBLE.size + length].tobytes()
    if zlib.crc32(text) != checksum:
        raise Unusable("its header is damaged")
    header = json.loads(text)
    if header["size"] != size:
        raise Unusable(f"{size} bytes instead of {header['size']}")
    if header["key"] != key:
        raise Unusable("it belongs to another data set")
    arrays = {}
    for entry in header["arrays"]:
        dtype, count = np.dtype(entry["dtype"]), int(np.prod(entry["shape"]))
        array = raw[entry["offset"]:entry["offset"] + count * dtype.itemsize]
        if zlib.crc32(array) != entry["crc32"]:
            raise Unusable(f"its array {entry['name']} is damaged")
        arrays[entry["name"]] = array.view(dtype).reshape(entry["shape"])
    return arrays


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _chunks(key: str, arrays: Mapping[str, np.ndarray]):
    """The file, piece by piece. Offsets depend on the length of the header that holds them: it gets room to spare."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    offset = first = _aligned(PREAMBLE.size + len(key.encode()) * 2 + 256 * (len(arrays) + 1))
    entries = []
    for name, array in arrays.items():
        entries.append({"name": name, "dtype": array.dtype.str, "shape": array.shape, "offset": offset,
                        "crc32": zlib.crc32(array.reshape(-1).view(np.uint8))})
        offset = _aligned(offset + array.nbytes)
    text = json.dumps({"key": key, "arrays": entries, "size": offset}).encode()
    assert PREAMBLE.size + len(text) <= first, "the header outgrew its room"
    yield PREAMBLE.pack(MAGIC, len(text), zlib.crc32(text)) + text
    written = PREAMBLE.size + len(text)
    for entry, array in zip(entries, arrays.values(), strict=True):
        yield bytes(entry["offset"] - written)
        yield array.reshape(-1).view(np.uint8).data
        written = entry["offset"] + array.nbytes
    yield bytes(offset - written)
