"""The moving average of the weights: what it is, under every layout, and after a resume."""
from __future__ import annotations

import json

import pytest
import torch

from megalm.checkpoint import find, read_weights
from megalm.engine.ema import Ema
from megalm.tools.convert import main as convert
from megalm.tools.generate import load_model
from tests import training

LAYOUTS = {
    "one": (1, "parallel.zero_stage=0"),
    "tp2-pp2": (4, "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"),
    "zero3": (2, "parallel.dp=2", "parallel.zero_stage=3"),
}


def test_it_is_the_recursion():
    weight, expected = torch.zeros(3), torch.zeros(3)
    ema = Ema(0.75, [weight])
    for step in range(1, 5):
        weight += step
        ema.update()
        expected = 0.75 * expected + 0.25 * weight
    assert torch.equal(ema.of(weight), expected) and ema.steps == 4
    ema.restart(4)
    assert torch.equal(ema.of(weight), expected)
    ema.restart(0)
    assert torch.equal(ema.of(weight), weight)


def run(tmp_path, name, *overrides):
    world, *layout = LAYOUTS[name]
    path = training.write_config(tmp_path, optimizer={"ema_decay": 0.5})
    folder = tmp_path / name
    assert training.start(world, path, f"train.dir={folder}", *layout, *overrides) == [(0, "")] * world
    return folder


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """A run whose weights are kept after each of its steps."""
    folder = tmp_path_factory.mktemp("serial")
    return run(folder, "one", "checkpoint.every=1", "checkpoint.keep=9", "train.stop_at=3")


def test_a_run_s_average_follows_its_weights(serial):
    weights = [read_weights(serial / "checkpoints" / f"step_{step:08d}") for step in (1, 2, 3)]
    averages = [read_weights(serial / "checkpoints" / f"step_{step:08d}", ema=True) for step in (1, 2, 3)]
    for before, after, now in ((0, 1, 1), (1, 2, 2)):
        for part, average in averages[after].items():
            assert torch.equal(average, 0.5 * averages[before][part] + 0.5 * weights[now][part]), part
    assert not torch.equal(averages[2]["final_norm.weight"], weights[2]["final_norm.weight"])


@pytest.mark.parametrize("name", ["tp2-pp2", "zero3"])
def test_every_layout_has_the_same_average(name, serial, tmp_path):
    folder = run(tmp_path, name, "train.stop_at=3")
    expected, found = read_weights(serial, ema=True), read_weights(folder, ema=True)
    assert set(expected) == set(found)
    for part in expected:
        torch.testing.assert_close(found[part], expected[part], atol=1e-5, rtol=0)


def test_a_resumed_run_has_the_same_bits_and_tools_take_it(serial, tmp_path, capsys):
    folder = run(tmp_path, "one", "train.stop_at=2")
    run(tmp_path, "one", "train.stop_at=3")
    expected, found = read_weights(serial, ema=True), read_weights(folder, ema=True)
    assert all(torch.equal(found[part], expected[part]) for part in expected)
    device, ids = torch.device("cpu"), list(b"abc")
    average, plain = (load_model(find(folder), device, ema).next_logits([ids]) for ema in (True, False))
    assert not torch.equal(average, plain)
    assert convert(["--from", str(folder), "--to", str(tmp_path / "average"), "--ema"]) == 0
    assert torch.equal(load_model(find(tmp_path / "average"), device).next_logits([ids]), average)
    assert convert(["--from", str(tmp_path / "average"), "--to", str(tmp_path / "again"), "--ema"]) == 2
    assert "has no moving average: optimizer.ema_decay wasn't set" in capsys.readouterr().err


def test_switched_on_later_it_begins_at_the_weights(tmp_path):
    path = training.write_config(tmp_path)
    assert training.start(1, path, "train.stop_at=1") == [(0, "")]
    ((code, said),) = training.start(1, path, "train.stop_at=2", "optimizer.ema_decay=0.5")
    assert code == 2 and "optimizer.ema_decay: stored None, now 0.5" in said
    overrides = ["train.stop_at=2", "optimizer.ema_decay=0.5", "checkpoint.allow_changes=true"]
    assert training.start(1, path, *overrides) == [(0, "")]
    folder = tmp_path / "run" / "checkpoints"
    before, after, average = (read_weights(folder / "step_00000001"), read_weights(folder / "step_00000002"),
                              read_weights(folder / "step_00000002", ema=True))
    assert all(torch.equal(average[part], 0.5 * before[part] + 0.5 * after[part]) for part in before)
    assert json.loads((folder / "step_00000002" / "checkpoint.json").read_text())["counters"]["ema_steps"] == 1
