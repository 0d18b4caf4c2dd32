"""A compressed .jsonl as pieces of its text, cut behind ends of lines: each is a part of the work, and kept after a stop.

Nobody can begin in the middle of such a file: one reader goes through it, and passes over what was done before.
"""
from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from itertools import count

from .inputs import Source
from .reading import BLOCK, naming_damage, open_stream


class Hashed:
    """The bytes of a file, counted and hashed as they are read."""

    def __init__(self, path: str):
        self.file, self.position, self.digest = io.FileIO(path), 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.position += len(block)
        self.digest.update(block)
        return block

    def close(self) -> None:
        self.file.close()


class TextStream:
    """The text of a source, piece by piece: `read` comes to an end where the piece does. Used as a context.

    A piece ends behind the first end of a line that is at or behind its byte number `piece_bytes`. `first`: the place of its
    first byte in the whole text.
    """

    def __init__(self, source: Source, piece_bytes: int):
        self.source, self.piece_bytes = source, piece_bytes
        self.position = 0  # in the text
        self.held = b""  # read, and not given away

    def __enter__(self) -> TextStream:
        self.source.check()
        self.file = Hashed(self.source.path)
        self.stream = open_stream(self.source, self.file)
        return self

    def __exit__(self, *_) -> None:
        self.stream.close()
        self.file.close()

    def pieces(self) -> Iterator[int]:
        """Begin each piece, at least one; what isn't read of it is passed over. Raises DataError for a damaged file."""
        for number in count():
            self.first, self.before = self.position, self.file.position
            self.left, self.over = self.piece_bytes, False
            yield number
            while self.read(BLOCK):
                pass
            if self.end()[0]:
                return

    def read(self, size: int) -> bytes:
        """At most about so many bytes of the piece; b"" at its end."""
        if self.over or not self._more(size):
            self.over = True
            return b""
        block, self.held = self.held, b""
        if self.left <= len(block):
            cut = block.find(b"\n", max(0, self.left - 1)) + 1
            if cut:
                self.over, self.held, block = True, block[cut:], block[:cut]
        self.left -= len(block)
        self.position += len(block)
        return block

    def end(self) -> tuple[bool, str, int]:
        """After the piece: is it the last, the hash of the file if it is, and the bytes of the file that it took."""
        last = not self._more(BLOCK)
        if last:
            self.source.check()
        return last, self.file.digest.hexdigest() if last else "", self.file.position - self.before

    def _more(self, size: int) -> bool:
        if not self.held:
            with naming_damage(self.source):
                self.held = self.stream.read(size)
        return bool(self.held)
