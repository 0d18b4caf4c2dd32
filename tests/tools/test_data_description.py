"""PREFIX.data.json through merge, split and shuffle: inherited where all have one, an error where two tokenizers meet."""
from __future__ import annotations

import json
from pathlib import Path

from megalm.data.description import read_description, tokenizer_identity
from megalm.data.tokenizer import TokenizerSource
from tests.data.helpers import numbered, write
from tests.data.models import make_sentencepiece
from tests.tools.test_data import names, refused, run


def describe(prefix: Path, tokenizer: dict, **more) -> None:
    Path(f"{prefix}.data.json").write_text(json.dumps({"format": 1, "tokenizer": tokenizer, **more}))


def made(folder: Path):
    """(sentencepiece identity, two data sets of one tokenizer)."""
    ours = tokenizer_identity(TokenizerSource("sentencepiece", str(make_sentencepiece(folder / "spm.model"))))
    for name, lengths in (("a", [5] * 30), ("b", [4] * 10)):
        numbered(folder / name, lengths)
        describe(folder / name, ours, sources=[{"name": f"{name}.jsonl", "size": 9, "hash": name}], options={"field": "text"})
    return ours


def test_inherited(tmp_path):
    ours = made(tmp_path)
    assert run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c") == 0
    merged = read_description(tmp_path / "c")
    assert merged["tokenizer"] == ours and [source["hash"] for source in merged["sources"]] == ["a", "b"]
    assert (merged["documents"], merged["sequences"], merged["tokens"], merged["dtype"]) == (40, 40, 190, "int32")
    assert merged["made_from"] == [str(tmp_path / "a"), str(tmp_path / "b")] and merged["options"] == {"field": "text"}
    assert run("split", tmp_path / "c", "--documents", "30,rest", "--names", "x,y", "--seed", 3) == 0
    assert [read_description(tmp_path / f"c_{name}")["documents"] for name in "xy"] == [30, 10]
    assert read_description(tmp_path / "c_y")["seed"] == 3
    for name, options in (("s", ()), ("t", ("--memory", 200))):
        assert run("shuffle", tmp_path / "c", "--output", tmp_path / name, *options) == 0
        shuffled = read_description(tmp_path / name)
        assert (shuffled["tokenizer"], shuffled["tokens"], shuffled["made_by"]) == (ours, 190, "shuffle")


def test_two_tokenizers_are_not_merged(tmp_path, capsys):
    made(tmp_path)
    describe(tmp_path / "b", {"type": "bytes", "path": None, "sha256": None})
    before = names(tmp_path)
    err = refused(capsys, "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c")
    assert "spm.model (sentencepiece" in err and "with bytes: their ids don't mean the same" in err and names(tmp_path) == before
    Path(f"{tmp_path}/b.data.json").write_text("{")
    assert "b.data.json can't be read" in refused(capsys, "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c")


def test_two_ends_of_document_are_not_merged(tmp_path, capsys):
    ours = made(tmp_path)
    for name, eod in (("a", 2), ("b", 1)):
        describe(tmp_path / name, ours | {"eod": eod})
    err = refused(capsys, "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c")
    assert "a ends its documents with token 2 and " in err and "b with 1; tokenize one" in err


def test_without_a_description_of_all_there_is_none(tmp_path, capsys):
    """That is said. An older one beside a data set that is replaced goes with it."""
    made(tmp_path)
    write(tmp_path / "other", [[1]], "int32")
    for inputs, there in ((("a", "b"), True), (("a", "other"), False)):
        assert run("merge", *(tmp_path / name for name in inputs), "--output", tmp_path / "c", "--overwrite") == 0
        assert (read_description(tmp_path / "c") is not None) == there
        said = f"no .data.json is written, as there is none of {tmp_path}/other: training won't notice the wrong tokenizer\n"
        assert capsys.readouterr().err == ("" if there else said)
    assert not list(tmp_path.glob("*.partial"))


def test_inspect_compares(tmp_path, capsys):
    ours = made(tmp_path)
    assert run("inspect", tmp_path / "a", "--verify", "--tokenizer", tmp_path / "spm.model") == 0
    assert f"tokenizer     {tmp_path}/spm.model (sentencepiece, SHA-256 {ours['sha256'][:12]})" in capsys.readouterr().out
    other = make_sentencepiece(tmp_path / "other.model", 330)
    assert "was made with the tokenizer" in refused(capsys, "inspect", tmp_path / "a", "--verify", "--tokenizer", other)
