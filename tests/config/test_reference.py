"""configs/KEYS.md is the page the code makes, and every key on it says what it means."""
from __future__ import annotations

from pathlib import Path

from megalm.config.explain import known_keys
from megalm.config.reference import page

FILE = Path(__file__).resolve().parents[2] / "configs" / "KEYS.md"


def test_file_is_current():
    assert FILE.read_text() == page(), "run: python -m megalm.config.reference > configs/KEYS.md"


def rows():
    section = ""
    for line in page().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| key"):
            key, default, values, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            yield f"{section}.{key.replace('[]', '')}", default, values, meaning


def test_every_key_is_there_and_has_a_meaning():
    listed = list(rows())
    assert {key for key, *_ in listed} == {key for key in known_keys() if "." in key}
    for key, _, values, meaning in listed:
        assert values and meaning and meaning[-1] in ".)", key
    assert all(line.endswith("|") for line in page().splitlines() if line.startswith("|")), "a row is a line"


def test_defaults_and_values():
    found = {key: (default, values) for key, default, values, _ in rows()}
    assert found["parallel.zero_stage"] == ("1", "integer >= 0 and <= 3")
    assert found["parallel.dp"] == ('"auto"', 'integer >= 1 or "auto"')
    assert found["model.num_layers"] == ("**required**", "integer >= 1")
    assert found["data.train.weight"] == ("1.0", "number > 0")
