"""The .bin/.idx format: the bytes, the round trip, every damage an .idx can have, and publication of both files or neither."""
from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megalm.data.errors import DataError
from megalm.data.indexed import IndexedReader, IndexedWriter, token_dtype
from tests.data.helpers import write

# The bytes that Megatron-LM's own writer gives for the documents [1, 2, 3] and [4, 5] in uint16.
GOLDEN_BIN = bytes.fromhex("01000200030004000500")
GOLDEN_SHA256 = "416ba3f8d9601192c5b0c9424ce7e61d6ac2d9d464dba8e5ee55deb8247de3aa"


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_golden_bytes(tmp_path):
    write(tmp_path / "a", [[1, 2, 3], [4, 5]])
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    index = (tmp_path / "a.idx").read_bytes()
    assert len(index) == 82 and hashlib.sha256(index).hexdigest() == GOLDEN_SHA256


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_round_trip(tmp_path, dtype):
    documents = [[1, 2, 3], [], [127], list(range(100))]
    reader = IndexedReader(write(tmp_path / "a", documents, dtype))
    assert [reader.tokens(i).tolist() for i in range(len(reader))] == documents
    assert reader.dtype == dtype and reader.total_tokens == 104 and reader.num_documents == 4
    assert reader.document_indices.tolist() == [0, 1, 2, 3, 4] and reader.lengths.tolist() == [3, 0, 1, 100]


def test_documents_of_several_sequences_or_none(tmp_path):
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([1, 2, 3], [1, 2])
        writer.add_document([], [])
        writer.append(np.array([4, 5, 6, 7]), [3, 1], [1, 0, 1])
    reader = IndexedReader(tmp_path / "a")
    assert reader.document_indices.tolist() == [0, 2, 2, 3, 3, 4]
    starts, lengths = reader.document_spans(np.arange(5))
    assert lengths.tolist() == [3, 0, 3, 0, 1]
    assert [reader.flat[s:s + n].tolist() for s, n in zip(starts, lengths, strict=True)] == [[1, 2, 3], [], [4, 5, 6], [], [7]]


def test_empty_data_set(tmp_path):
    reader = IndexedReader(write(tmp_path / "a", []))
    assert len(reader) == reader.num_documents == reader.total_tokens == 0


def test_dtype_rule():
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


def test_tokens_are_views_and_bounded(tmp_path):
    reader = IndexedReader(write(tmp_path / "a", [[1, 2], [3]]))
    assert not reader.tokens(0).flags.owndata and not reader.tokens(0).flags.writeable
    assert reader.tokens(-1).tolist() == [3]
    with pytest.raises(IndexError, match="sequence 2 of .* which has 2"):
        reader.tokens(2)


@pytest.mark.parametrize("token", [65536, -1])
def test_token_that_does_not_fit(tmp_path, token):
    with pytest.raises(DataError, match=f"token id {token} doesn't fit uint16"):
        write(tmp_path / "a", [[1], [token]])
    assert files_in(tmp_path) == set()


def test_lengths_that_do_not_add_up(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer, pytest.raises(ValueError, match="3 tokens in sequences of 2"):
        writer.add_document([1, 2, 3], [1, 1])


def test_floats_are_refused(tmp_path):
    with pytest.raises(DataError, match="can't be stored as float32"):
        IndexedWriter(tmp_path / "a", np.float32)


# Damage. Two sequences of 3 and 2 uint16 tokens: the lengths begin at byte 34, the pointers at 42, the documents at 58.

def put(place: int, form: str, value: int):
    return lambda raw: raw[:place] + struct.pack(form, value) + raw[place + struct.calcsize(form):]


DAMAGE = {
    "empty": (lambda raw: b"", "truncated: 0 bytes"),
    "half a header": (lambda raw: raw[:20], "truncated: 20 bytes, and the header alone has 34"),
    "truncated": (lambda raw: raw[:-1], "truncated: 81 bytes, .* take 82"),
    "too long": (lambda raw: raw + b"x", "too long: 83 bytes"),
    "modes": (lambda raw: raw + b"\0\0", "multimodal"),
    "magic": (lambda raw: b"X" + raw[1:], "not an index file: it starts with"),
    "half a wrong magic": (lambda raw: b"MMX", "not an index file: it starts with"),
    "legacy": (lambda raw: b"TNTIDX\0\0" + raw[8:], "old TNTIDX format"),
    "version": (put(9, "<Q", 2), "version 2 of the format; only 1"),
    "unknown dtype": (put(17, "<B", 9), "unknown dtype code 9; known are"),
    "float dtype": (put(17, "<B", 7), "dtype code 7 is a floating-point type"),
    "huge count": (put(18, "<Q", 2**63), "truncated: 82 bytes"),
    "no document index": (lambda raw: put(26, "<Q", 0)(raw)[:-24], "document indices must go from 0 to the 2 sequences: none"),
    "documents start": (put(58, "<q", 1), "document indices must go from 0 to the 2 sequences: 1 to 2"),
    "documents end": (put(74, "<q", 3), "document indices must go from 0 to the 2 sequences: 0 to 3"),
    "documents decrease": (put(66, "<q", 9), "document 1 ends at sequence 2, before its start 9"),
    "negative length": (put(38, "<i", -2), "sequence 1 has a negative length, -2"),
    "length past the .bin": (put(38, "<i", 3), "sequence 1 points past the end of a.bin: bytes 6 to 12 of 10"),
    "pointer past the .bin": (put(50, "<q", 8), "sequence 1 points past the end of a.bin: bytes 8 to 12 of 10"),
    "huge pointer": (put(50, "<q", 2**63 - 2), "sequence 1 points past the end of a.bin"),
    "negative pointer": (put(50, "<q", -2), "sequence 1 starts at byte -2"),
    "odd pointer": (put(50, "<q", 5), "sequence 1 starts at byte 5, which is no multiple of 2"),
    "short": (put(38, "<i", 1), "a.bin has 10 bytes and a.idx describes 8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_index(tmp_path, name):
    damage, message = DAMAGE[name]
    write(tmp_path / "a", [[1, 2, 3], [4, 5]])
    path = tmp_path / "a.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        IndexedReader(tmp_path / "a")
    assert "\n" not in str(error.value) and "a.idx" in str(error.value)


def test_any_byte_of_the_header_matters(tmp_path):
    """No single changed byte among magic, version, dtype and counts is read as a data set of the same tokens."""
    write(tmp_path / "a", [[1, 2, 3], [4, 5]])
    path = tmp_path / "a.idx"
    raw = path.read_bytes()
    for place in range(34):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x41]) + raw[place + 1:])
        with pytest.raises(DataError):
            IndexedReader(tmp_path / "a")


def test_cut_bin(tmp_path):
    write(tmp_path / "a", [[1, 2, 3], [4, 5]])
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN[:-2])
    with pytest.raises(DataError, match="sequence 1 points past the end"):
        IndexedReader(tmp_path / "a")


def test_sequences_of_a_document_apart(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3, 4], [2, 2])
    path = tmp_path / "a.idx"
    path.write_bytes(put(42, "<q", 4)(put(50, "<q", 0)(path.read_bytes())))
    with pytest.raises(DataError, match="don't follow each other"):
        IndexedReader(tmp_path / "a").check_documents()


@pytest.mark.parametrize("names, asked, message", [
    ([], "a", "no data set at .*neither .*a.bin nor .*a.idx"),
    (["a.bin"], "a", "a.bin has no a.idx beside it: it was not finished"),
    (["a.idx"], "a", "a.idx has no a.bin beside it"),
    (["a.bin", "a.idx"], "a.bin", "named without .bin"),
    (["a.bin", "a.idx"], "a.idx", "named without .idx"),
])
def test_missing_files(tmp_path, names, asked, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        IndexedReader(tmp_path / asked)


# Publication.

def test_nothing_is_visible_before_the_end(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.zeros(1 << 20, np.uint16))
        assert files_in(tmp_path) == {"a.bin.partial"}
    assert files_in(tmp_path) == {"a.bin", "a.idx"}


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1])
        raise KeyError
    assert files_in(tmp_path) == set()


def test_existing_is_replaced_only_on_request(tmp_path):
    write(tmp_path / "a", [[1]])
    with pytest.raises(DataError, match="a.bin exists already"):
        IndexedWriter(tmp_path / "a", np.uint16)
    write(tmp_path / "a", [[2, 3]], overwrite=True)
    assert IndexedReader(tmp_path / "a").tokens(0).tolist() == [2, 3]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(b"x" * 1000)
    assert IndexedReader(write(tmp_path / "a", [[1]])).total_tokens == 1
    assert files_in(tmp_path) == {"a.bin", "a.idx"}


def test_two_writers_at_once(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match="another process is writing it now"):
            IndexedWriter(tmp_path / "a", np.uint16)
    assert IndexedReader(tmp_path / "a").total_tokens == 1


def test_full_disk_keeps_the_old_data_set(tmp_path, monkeypatch):
    write(tmp_path / "a", [[1]])

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megalm.data.publish.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", [[2, 3]], overwrite=True)
    assert files_in(tmp_path) == {"a.bin", "a.idx"} and IndexedReader(tmp_path / "a").tokens(0).tolist() == [1]


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_crash_at_any_rename_shows_the_old_the_new_or_an_error(tmp_path, monkeypatch, survived):
    """Overwriting two files can't be atomic: what is never seen is the .idx of one with the .bin of the other."""
    write(tmp_path / "a", [[1, 2]])
    calls = []
    for name in ("unlink", "replace"):
        real = getattr(os, name)

        def step(*arguments, real=real):
            if len(calls) == survived:
                raise KeyboardInterrupt
            calls.append(arguments)
            real(*arguments)

        monkeypatch.setattr(f"megalm.data.publish.os.{name}", step)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[3, 4]], overwrite=True)
    monkeypatch.undo()
    if survived == 0:
        assert IndexedReader(tmp_path / "a").tokens(0).tolist() == [1, 2]
    else:
        with pytest.raises(DataError, match="a.bin has no a.idx beside it"):
            IndexedReader(tmp_path / "a")
