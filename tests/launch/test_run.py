"""The command line of the launcher, and how many ranks a config asks for."""

from __future__ import annotations

import pytest

from megalm.config import load
from megalm.launch.local import world_size
from megalm.launch.run import parse
from megalm.plan import PlanError


@pytest.mark.parametrize(
    "argv",
    [
        ["c.json", "train.steps=5", "batch.micro=1"],
        ["--config", "c.json", "train.steps=5", "batch.micro=1"],
        ["train.steps=5", "--config=c.json", "batch.micro=1"],
        ["--local_rank=3", "--config", "c.json", "train.steps=5", "batch.micro=1"],
        ["--local-rank", "3", "c.json", "train.steps=5", "batch.micro=1"],
    ],
)
def test_every_launcher_can_call_it(argv):
    arguments = parse(argv)
    assert arguments.config == "c.json" and arguments.overrides == ["train.steps=5", "batch.micro=1"]
    assert arguments.local_rank == (3 if any("local" in word for word in argv) else None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no config file given"),
        (["c.json", "steps"], "'steps' is neither an option nor a section.key=value"),
        (["c.json", "--stepps=5"], "--stepps=5"),
    ],
)
def test_a_wrong_command_line_is_one_error(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(("dp", "gpus", "world"), [("auto", 0, 4), ("auto", 8, 8), (2, 0, 8), (2, 8, 8), (1, 8, 4)])
def test_world_size(config_file, dp, gpus, world):
    assert world_size(load(config_file, [f"parallel.dp={dp}"]), gpus) == world


@pytest.mark.parametrize(
    ("dp", "gpus", "said"),
    [
        (4, 8, r"needs 16 GPUs but 8 are visible here; with CUDA_VISIBLE_DEVICES= \(empty\) before the command"),
        ("auto", 1, r"needs 4 GPUs but 1 is visible here; with CUDA_VISIBLE_DEVICES= \(empty\)"),
        ("auto", 6, "divide the 6 visible GPUs"),
    ],
)
def test_gpus_that_do_not_fit(config_file, dp, gpus, said):
    with pytest.raises(PlanError, match=said):
        world_size(load(config_file, [f"parallel.dp={dp}"]), gpus)
