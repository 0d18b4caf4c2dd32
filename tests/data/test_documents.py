"""Reading documents: batches, line numbers, and what is wrong with a line, in words."""
from __future__ import annotations

import json

import pytest

from megalm.data import documents
from megalm.data.documents import check_inputs, read_batches, read_text
from megalm.data.errors import DataError


def texts(paths, field="text"):
    return [read_text(batch, place, field) for batch in read_batches(paths) for place in range(len(batch.documents))]


def test_json_lines_and_plain_text(tmp_path):
    lines, plain = tmp_path / "a.jsonl", tmp_path / "b.txt"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one\\nline"}\r\n\n   \n{"body": 3, "text": "\\u00e9\\ud83d\\ude00\\u2028x"}\n'
                      b'{"text": ""}')
    plain.write_bytes("all of it\n\nis one \u2028 document\n".encode())
    assert texts([str(lines), str(plain)]) == ["one\nline", "é😀\u2028x", "", "all of it\n\nis one \u2028 document\n"]
    assert [batch.lines for batch in read_batches([str(lines), str(plain)])] == [[1, 4, 5], [1]]
    assert check_inputs([str(lines), str(plain)]) == lines.stat().st_size + plain.stat().st_size


def test_batches_are_bounded_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 100)
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 7)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(i) * (i % 40)}) + "\n" for i in range(200)))
    batches = list(read_batches([str(path)]))
    assert [line for batch in batches for line in batch.lines] == list(range(1, 201))
    assert all(len(batch.documents) <= 7 and batch.size - len(batch.documents[-1]) < 100 for batch in batches)


@pytest.mark.parametrize("line, message", [
    (b'{"text": "a"', r"a.jsonl, line 2: not JSON: Expecting ',' delimiter at character 13"),
    (b"nonsense", "line 2: not JSON: Expecting value at character 1"),
    (b'{"text": "a"} x', "line 2: not JSON: Extra data at character 15"),
    (b'{"text": "\xff"}', "line 2: not UTF-8 at byte 10 of the line"),
    (b"[1]", "line 2: a JSON array and not an object with the field 'text'"),
    (b'{"txt": "a", "b": 1}', "line 2: no field 'text'; it has 'txt', 'b'"),
    (b"{}", "line 2: no field 'text'; it has none"),
    (b'{"text": null}', "line 2: the field 'text' is a JSON null and not a string"),
    (b'{"text": "\\ud83d"}', "line 2: half a surrogate pair, .*ud83d"),
    (b'{"text": ' + b"[" * 100_000, "line 2: not JSON that can be read"),
])
def test_invalid_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as error:
        texts([str(path)])
    assert "\n" not in str(error.value)


def test_invalid_plain_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff")
    with pytest.raises(DataError, match="a.txt: not UTF-8 at byte 5"):
        texts([str(tmp_path / "a.txt")])


def test_inputs_that_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("")
    for name, message in (("none.jsonl", "none.jsonl is missing"), ("", "is a folder"), ("a.csv", "suffix '.csv' isn't known")):
        with pytest.raises(DataError, match=message):
            check_inputs([str(tmp_path / name)])
