"""`megalm checkpoint average`: the mean of each element, in a checkpoint that generate, convert and init_from take."""
from __future__ import annotations

import json
import shutil

import pytest
import torch

from megalm.checkpoint import find, read_weights
from megalm.tools.checkpoint import main as checkpoint_main
from megalm.tools.convert import main as convert
from megalm.tools.generate import load_model
from tests import training
from tests.tools.test_generate import CPU, GPT2, LLAMA, checkpoint


def main(arguments: list[str]) -> int:
    return checkpoint_main(["average", *arguments])


def runs(tmp_path, count, model=GPT2):
    return [str(checkpoint(tmp_path / f"run{i}", model, step=i + 1)[0]) for i in range(count)]


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.5]], ids=["equal", "weighted"])
def test_the_mean_of_every_element(weights, tmp_path):
    folders = runs(tmp_path, 3)
    options = ["--weights", *map(str, weights)] if weights else []
    assert main([*folders, "--output", str(tmp_path / "mean"), *options]) == 0
    sources, mean = [read_weights(folder) for folder in folders], read_weights(tmp_path / "mean")
    shares = [weight / 4.5 for weight in weights] if weights else [1 / 3] * 3
    assert set(mean) == set(sources[0])
    for part, tensor in mean.items():
        expected = sum(share * source[part].double() for share, source in zip(shares, sources, strict=True))
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected.float()), part


def test_of_one_checkpoint_it_is_the_checkpoint_and_everything_takes_it(tmp_path):
    (folder,) = runs(tmp_path, 1, LLAMA)
    assert main([folder, "--output", str(tmp_path / "mean")]) == 0
    before, after = read_weights(folder), read_weights(tmp_path / "mean")
    assert all(torch.equal(before[part], after[part]) for part in before)
    ids = list(b"def")
    mean, one = (load_model(find(path), CPU).next_logits([ids]) for path in (tmp_path / "mean", folder))
    assert torch.equal(mean, one)
    assert convert(["--from", str(tmp_path / "mean"), "--to", f"hf:{tmp_path / 'hf'}"]) == 0
    path = training.write_config(tmp_path, checkpoint={"init_from": str(tmp_path / "mean")}, train={"steps": 2})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": LLAMA | {"seq_length": 24}}))
    assert training.start(1, path, "train.stop_at=1", poisoned=(0,)) == [(0, "")]
    started = read_weights(find(tmp_path / "run"))
    assert all(torch.equal(started[part], before[part]) for part in before)


@pytest.mark.parametrize("options, message", [
    (["--weights", "1"], "--weights: 1 numbers for 2 checkpoints"),
    (["--weights", "1", "-1"], "finite numbers with a sum above 0 expected"),
    (["--weights", "nan", "1"], "finite numbers with a sum above 0 expected"),
])
def test_weights_that_mean_nothing(options, message, tmp_path, capsys):
    folders = runs(tmp_path, 2)
    assert main([*folders, "--output", str(tmp_path / "mean"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "mean").exists()


def test_the_same_checkpoint_twice_is_a_mistake_whatever_it_is_called(tmp_path, capsys):
    (folder,) = runs(tmp_path, 1)
    shutil.copytree(folder, tmp_path / "copy")
    for other in (str(tmp_path / "run0"), str(tmp_path / "copy")):
        assert main([folder, other, "--output", str(tmp_path / "mean")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {folder} and {other} are the same checkpoint; ") and error.count("\n") == 1
        assert not (tmp_path / "mean").exists()


def test_different_models_are_refused(tmp_path, capsys):
    one, _ = checkpoint(tmp_path / "one", GPT2)
    other, _ = checkpoint(tmp_path / "other", LLAMA)
    assert main([str(one), str(other), "--output", str(tmp_path / "mean")]) == 2
    error = capsys.readouterr().err
    assert "are different models" in error and "model.normalization: 'layer_norm' and 'rms_norm'" in error
    assert error.count("\n") == 1 and not (tmp_path / "mean").exists()
