"""Inputs: names, globs, folders, gzip, and what isn't UTF-8."""
from __future__ import annotations

import gzip
import json
import sys

import pytest

from megalm.data.documents import Batch
from megalm.data.errors import DataError
from megalm.data.inputs import find_files, read_files, text_of
from tests.data.real_text import KINDS, MALFORMED


def corpus(folder):
    """Every kind of real text in a file of its own: plain, gzipped, below a folder."""
    (folder / "deep").mkdir()
    for name, texts in KINDS.items():
        content = "".join(json.dumps({"text": text}, ensure_ascii=name == "emoji") + "\n" for text in texts).encode()
        if name in ("zh", "rtl"):
            (folder / "deep" / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{name}.jsonl").write_bytes(content)
    (folder / "notes.md").write_text("not text for us")
    return folder


def read(paths, **policy) -> list[str | None]:
    return [text_of(batch, place, "text", **policy)
            for batch in read_files(paths, "text") for place in range(len(batch.documents))]


def test_folders_globs_and_names(tmp_path):
    corpus(tmp_path)
    expected = [text for name in ("zh", "rtl") for text in KINDS[name]]
    assert sorted(read(find_files([str(tmp_path / "deep")]))) == sorted(expected)
    assert sorted(read(find_files([str(tmp_path)]))) == sorted(text for texts in KINDS.values() for text in texts)
    assert read(find_files([f"{tmp_path}/e*.jsonl"])) == KINDS["emoji"] + KINDS["en"]
    assert read(find_files([f"{tmp_path}/en.jsonl", f"{tmp_path}/deep/zh.jsonl.gz"])) == KINDS["en"] + KINDS["zh"]
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress("床前\n明月".encode()))
    assert read([str(tmp_path / "one.txt.gz")]) == ["床前\n明月"]


def test_zstandard(tmp_path):
    """Of two frames, one of which ends within a line; cut short, it isn't taken for a whole one."""
    import zstandard
    content = "".join(json.dumps({"text": text}) + "\n" for texts in KINDS.values() for text in texts).encode()
    packed = zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    assert read(find_files([str(tmp_path)])) == [text for texts in KINDS.values() for text in texts]
    for damaged in (packed[:-5], b"plain text"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged .zst"):
            read([str(path)])


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    texts = [text for texts in KINDS.values() for text in texts] * 200
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, row_group_size=1500)
    assert read(find_files([str(path)])) == texts
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"nothing of the kind")
    for name, message in (("b", "no column 'text'; it has 'body'"), ("c", "row 2: null"), ("d", "can't be read as parquet")):
        with pytest.raises(DataError, match=message):
            read([f"{tmp_path}/{name}.parquet"])


@pytest.mark.parametrize("package, name", [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_without_the_package(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"needs the {package} package: pip install"):
        read([str(tmp_path / name)])


def test_names_that_give_nothing(tmp_path):
    corpus(tmp_path)
    (tmp_path / "bare").mkdir()
    for names, message in [(["none.jsonl"], "none.jsonl is missing"), (["none.jsonl.gz"], "is missing"),
                           (["x*.jsonl"], "fits no file"), (["bare"], "is a folder without"), (["notes.md"], "'.md' isn't known"),
                           (["en.jsonl", "e*.jsonl"], "en.jsonl is given twice")]:
        with pytest.raises(DataError, match=message.replace("*", r"\*")):
            find_files([str(tmp_path / name) for name in names])


@pytest.mark.parametrize("damage", [lambda raw: raw[:-12], lambda raw: raw[:40] + b"xxxx" + raw[44:], lambda raw: b"plain text"])
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps({"text": "a text " + "".join(map(chr, range(33, 900)))}).encode() + b"\n")))
    with pytest.raises(DataError, match="a.jsonl.gz: damaged .gz"):
        read([str(path)])


@pytest.mark.parametrize("raw", MALFORMED)
@pytest.mark.parametrize("json_lines", [True, False])
def test_what_is_not_utf8(raw, json_lines):
    document = b'{"text": "' + raw + b'"}\n' if json_lines else raw
    batch = Batch("a", json_lines, [document], [1])
    assert text_of(batch, 0, "text", "replace") == MALFORMED[raw] and text_of(batch, 0, "text", "drop") is None
    with pytest.raises(DataError, match="not UTF-8"):
        text_of(batch, 0, "text", "stop")


def test_half_a_pair_in_json():
    documents = [b'{"text": "x\\ud83dy \\ud83d\\ude00"}', b'{"text": "\xff\\ude00"}', b'{"other": "\xff"}']
    batch = Batch("a", True, documents, [1, 2, 3])
    assert text_of(batch, 0, "text", "replace") == "x\ufffdy 😀" and text_of(batch, 0, "text", "drop") is None
    assert text_of(batch, 1, "text", "replace") == "\ufffd\ufffd"
    with pytest.raises(DataError, match="half a surrogate pair"):
        text_of(batch, 0, "text")
    with pytest.raises(DataError, match="no field 'text'"):
        text_of(batch, 2, "text", "replace")
