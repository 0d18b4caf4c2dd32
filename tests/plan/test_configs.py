"""The configs that come with megalm fit the clusters that configs/README.md names, in numbers and in memory."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalm.config import load
from megalm.plan import make_plan
from megalm.plan.memory import memory
from megalm.plan.parameters import model_size

FOLDER = Path(__file__).resolve().parents[2] / "configs"
ROW = re.compile(r"^\| (\w+) \| ([\d,]+) \| (\d+) x (\d+) x (\d+) \| ([\d,]+) \| ([\d,]+) \|", re.MULTILINE)


def number(text):
    return int(text.replace(",", ""))


ROWS = {name: tuple(map(number, numbers)) for name, *numbers in ROW.findall((FOLDER / "README.md").read_text())}
# As published, for the models that have a publication; megalm counts the padded vocabulary.
PUBLISHED = {"gpt2_125m": 124e6, "gpt2_1p5b": 1.558e9, "llama_7b": 6.74e9, "llama3_8b": 8.03e9, "llama3_70b": 70.6e9,
             "gpt3_175b": 174.6e9, "gpt_1t": 1.008e12}


def test_every_config_has_its_row():
    assert set(ROWS) == {path.stem for path in FOLDER.glob("*.json")}
    assert len(ROWS) == 8


@pytest.mark.parametrize("name", ROWS)
def test_config_is_what_the_table_says(name):
    parameters, tp, pp, dp, gpus, tokens = ROWS[name]
    config = load(FOLDER / f"{name}.json")
    plan = make_plan(config, gpus)
    assert (plan.tp, plan.pp, plan.dp) == (tp, pp, dp)
    assert model_size(config, plan) == parameters
    assert plan.global_batch * config.model.seq_length == tokens
    assert parameters == pytest.approx(PUBLISHED.get(name, parameters), rel=0.005)


@pytest.mark.parametrize("name", ROWS)
def test_config_fits_the_memory_of_its_gpus(name):
    config = load(FOLDER / f"{name}.json")
    plan = make_plan(config, ROWS[name][4])
    assert max(stage.total for stage in memory(config, plan)) < 72 * 2**30


def test_commands_of_the_readme():
    commands = re.findall(r"^    megalm \w+ (\S+)(.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for path, rest in commands:
        assert load(FOLDER.parent / path, [word for word in rest.split() if "=" in word])


@pytest.mark.parametrize("name", ROWS)
def test_config_names_its_schema(name):
    assert '"$schema": "../megalm/config/schema.json"' in (FOLDER / f"{name}.json").read_text()
