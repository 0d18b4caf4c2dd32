"""The corpus of the quickstart: which files, in which order, and what is left out."""
from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from megalm.tools import collect_corpus


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments) -> int:
    return collect_corpus.main([str(argument) for argument in arguments])


def test_sorted_and_split(tmp_path):
    folder = tmp_path / "lib"
    (folder / "pkg").mkdir(parents=True)
    (folder / "site-packages").mkdir()
    for i in range(20):
        (folder / f"m{i:02}.py").write_text(f"x = {i}\n")
    (folder / "pkg" / "a.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\r\n".encode("latin-1"))
    (folder / "pkg" / "bad.py").write_bytes(b"x = '\xff'\n")
    (folder / "pkg" / "worse.py").write_bytes(b"# coding: no-such-encoding\n")
    (folder / "pkg" / "empty.py").write_bytes(b"")
    (folder / "pkg" / "data.txt").write_text("no source")
    (folder / "site-packages" / "other.py").write_text("not the library\n")
    train, valid = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "valid.jsonl"
    assert run("--folder", folder, "--output", train, "--valid", valid, "--every", 7) == 0
    assert [entry["path"] for entry in read(valid)] == ["m06.py", "m13.py", "pkg/a.py"]
    assert read(valid)[2]["text"] == "# -*- coding: latin-1 -*-\nx = 'é'\n"
    assert [entry["path"] for entry in read(train)] == [f"m{i:02}.py" for i in range(20) if i not in (6, 13)]
    first = train.read_bytes()
    assert run("--folder", folder, "--output", train, "--valid", valid, "--every", 7) == 0 and train.read_bytes() == first


def test_the_standard_library_is_there():
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path.as_posix() for path in collect_corpus.source_files(library, collect_corpus.NOT_THE_LIBRARY)]
    assert {"os.py", "json/decoder.py"} <= set(files) and len(files) > 300 and files == sorted(files)
    assert not [path for path in files if "site-packages" in path]


def test_bad_input(tmp_path, capsys):
    usual = ("--output", tmp_path / "t.jsonl", "--valid", tmp_path / "v.jsonl")
    for arguments, message in [
        (("--folder", tmp_path / "none"), "none is no folder"),
        (("--folder", tmp_path), "has 0 readable Python files; validation takes every 50th"),
        (("--folder", tmp_path, "--every", 1), "--every is 1"),
    ]:
        assert run(*arguments, *usual) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
