"""Bytes that tell when they have changed: JSON files that end with their own hash, and hashes of a tensor's blocks.

xxh3 (64 bits, seed 0, 16 hexadecimal digits) finds damage, not malice. Nothing here needs torch.
"""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 4 << 20
"""Each tensor's bytes are hashed by blocks of this size from its first byte on; the last one may be shorter."""
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""What the kernel says of files that are lost or broken; anything else (too many open files, no permission, no memory) is this
machine's trouble, and the checkpoint may be sound."""
SEAL = '  "xxh3": "{}"\n}}\n'


class CheckpointError(ValueError):
    """A checkpoint can't be written, found, read or resumed from; the message says which, what is wrong, and where."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint aren't those that were written; an earlier one may be whole."""


class UnreadableError(CheckpointError):
    """This machine can't read a file now; it may be sound, and no reason to take another."""


def digest(content: bytes | memoryview) -> str:
    """xxh3-64 of the bytes."""
    return xxhash.xxh3_64_hexdigest(content)


def blocks(content: memoryview, size: int = BLOCK_BYTES) -> Iterator[memoryview]:
    """The content cut into blocks of `size` bytes; none of an empty one."""
    return (content[start: start + size] for start in range(0, len(content), size))


def blocks_of_stream(stretches: Iterator[memoryview], size: int = BLOCK_BYTES) -> Iterator[memoryview]:
    """The stretches' bytes, one after the other, cut into blocks of `size` bytes."""
    rest = b""
    for stretch in stretches:
        if rest:
            missing = size - len(rest)
            rest, stretch = rest + bytes(stretch[:missing]), stretch[missing:]
            if len(rest) < size:
                continue
            yield memoryview(rest)
        whole = len(stretch) - len(stretch) % size
        yield from blocks(stretch[:whole], size)
        rest = bytes(stretch[whole:])
    if rest:
        yield memoryview(rest)


def seal(document: Mapping[str, Any]) -> bytes:
    """A JSON object, a line a key, whose last key "xxh3" is the hash of every byte before that key's line."""
    assert document and "xxh3" not in document
    lines = [f"  {json.dumps(str(key))}: {json.dumps(item)},\n" for key, item in document.items()]
    body = ("{\n" + "".join(lines)).encode()
    return body + SEAL.format(digest(body)).encode()


def unseal(content: bytes, path: Path) -> dict[str, Any]:
    """The object that `seal` wrote into `path`, its hash included. Raises DamagedError for anything else."""
    body = content[: -len(SEAL.format("0" * 16))]
    if not body or content[len(body):] != SEAL.format(digest(body)).encode():
        raise DamagedError(f"{path}: not what was written there: {_why(content)}")
    return parse(content, path)


def seal_of(content: bytes) -> str | None:
    """The hash that sealed content ends with; None where it ends otherwise."""
    end = content[-len(SEAL.format("0" * 16)):].decode("ascii", "replace")
    found = end[len(SEAL.split("{}")[0]):][:16]
    return found if end == SEAL.format(found) else None


def _why(content: bytes) -> str:
    """What the content is, if not the JSON that was expected."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return "its own xxh3 is another" if isinstance(found, dict) and "xxh3" in found else "no xxh3 at its end"


def unreadable(error: OSError, what: str) -> CheckpointError:
    """The error to raise for one of the file system while `what` was read: a DamagedError where an earlier checkpoint helps."""
    if error.errno in DAMAGE:
        return DamagedError(f"{what}: {error.strerror}")
    return UnreadableError(f"{what} can't be read: {error.strerror or error}")


def size(path: Path) -> int | None:
    """A file's size in bytes; None where there is no such file. Raises as `read` does."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(error, str(path)) from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def read(path: Path) -> bytes:
    """A small file's content. Raises DamagedError when it is missing or broken, UnreadableError when it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(error, str(path)) from error


def parse(content: bytes, path: Path) -> Any:
    """JSON. Raises DamagedError where it isn't."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not JSON: {error}") from error
