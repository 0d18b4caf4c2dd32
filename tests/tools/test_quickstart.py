"""make quickstart's own part: the steps and their order, what a failing or interrupted step does, and the verdict."""
from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.config import load
from megalm.data import IndexedWriter
from megalm.launch.run import parse
from megalm.tools import preprocess, quickstart, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Nothing is run: the steps asked for, as (title, command, keywords). There are no GPUs, and the loss is good."""
    taken = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart, "step", lambda title, command, *rest, **keywords: taken.append((title, command, keywords)))
    monkeypatch.setattr(quickstart, "draw_loss", lambda folder, unigram_entropy: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    judge(monkeypatch, entropy=6.0, loss=5.0)
    return taken


def judge(monkeypatch, entropy: float, loss: float) -> None:
    monkeypatch.setattr(quickstart, "unigram_entropy", lambda config: entropy)
    monkeypatch.setattr(quickstart, "last_evaluation", lambda folder: loss)


def test_the_steps_in_their_order(steps):
    assert quickstart.main(["train.steps=70"]) == 0
    commands = [command for _, command, _ in steps]
    assert [command[:2] for command in commands] == [
        ["megalm.tools.collect_corpus", "--output"], ["megalm.cli", "train-tokenizer"], ["megalm.cli", "preprocess"],
        ["megalm.cli", "preprocess"], ["megalm.cli", "train"], ["megalm.cli", "generate"]]
    # Each is fed with what the ones before it have made, and the programs know their options.
    tokenizer = train_tokenizer.parser().parse_args(commands[1][2:])
    train, valid = (preprocess.parser().parse_args(command[2:]) for command in commands[2:4])
    config = load(quickstart.CONFIG)
    assert tokenizer.input == train.input == [commands[0][2]] and valid.input == [commands[0][4]]
    assert tokenizer.output == train.tokenizer == valid.tokenizer == config.tokenizer.path
    assert [train.output] == [source.path for source in config.data.train]
    assert [valid.output] == [source.path for source in config.data.valid]
    training = parse(commands[4][2:])
    assert (training.config, training.overrides) == (quickstart.CONFIG, ["train.steps=70"])
    assert commands[5][3] == config.train.dir


@pytest.mark.parametrize(("gpus", "variables"), [(0, ["CUDA_VISIBLE_DEVICES="]), (7, ["CUDA_VISIBLE_DEVICES="]), (8, [])])
def test_the_eight_ranks_train_on_the_cpu_where_there_are_fewer_gpus(steps, gpus, variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert quickstart.main([]) == 0
    assert [keywords["variables"] for title, _, keywords in steps if title == "train"] == [variables]


@pytest.mark.parametrize(("loss", "code"), [(5.0, 0), (5.5, 0), (5.501, 1), (6.5, 1)])
def test_the_loss_must_be_half_a_nat_below_the_entropy(steps, loss, code, monkeypatch, capsys):
    judge(monkeypatch, entropy=6.0, loss=loss)
    assert quickstart.main([]) == code
    out, err = capsys.readouterr()
    assert "6.000 nats a token" in out and f"{loss:.3f} nats a token, {6 - loss:.3f} below" in out
    assert err == ("" if code == 0 else "error: that is less than 0.5 nats: the model learned frequencies, not context\n")


def tiny_config(folder: Path, documents: list[list[int]], samples: int):
    """A config whose validation data are these documents, in samples of 8 tokens."""
    with IndexedWriter(folder / "valid", np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.uint16))
    path = folder / "config.json"
    path.write_text(json.dumps({
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8},
        "batch": {"micro": 1, "global": 1}, "precision": {"dtype": "fp32"}, "optimizer": {"lr": 0.1},
        "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "none"}], "valid": [{"path": str(folder / "valid")}]},
        "train": {"dir": str(folder), "steps": 1, "eval_samples": samples}}))
    return load(path)


@pytest.mark.parametrize(("period", "expected"), [
    ([1, 2, 3, 4], math.log(4)), ([7, 7, 7, 9], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)), ([5, 5, 5, 5], 0.0)])
def test_the_entropy_of_known_frequencies(period, expected, tmp_path):
    """Wherever a sample begins in a text of period 4, its 8 labels hold each token in its share."""
    config = tiny_config(tmp_path, [period * 20], samples=6)
    assert quickstart.unigram_entropy(config) == pytest.approx(expected, abs=1e-12)


def test_the_newest_evaluation_counts(tmp_path):
    lines = [{"step": 1, "loss": 9.0}, {"step": 1, "eval_loss": 8.0}, {"step": 2, "eval_loss": 7.0}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert quickstart.last_evaluation(tmp_path) == 7.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="train.eval_every must not be 0"):
        quickstart.last_evaluation(tmp_path)


def test_a_step_shows_its_command_and_keeps_what_it_prints(tmp_path, capsys):
    product = tmp_path / "sample"
    quickstart.step("say", ["megalm.cli", "--version"], save=product, variables=["A=b c"])
    out = capsys.readouterr().out
    assert "$ 'A=b c' megalm --version" in out and out.splitlines()[3] + "\n" == product.read_text() and "megalm 0." in out
    quickstart.step("say", ["no.such.module"], product)
    assert f"say: {product} is there already" in capsys.readouterr().out


def test_a_failing_step_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(quickstart, "prepare", lambda: quickstart.step("prepare", ["megalm.cli", "nothing"]))
    assert quickstart.main([]) == 2
    error = capfd.readouterr().err.splitlines()
    assert error[-1] == "error: prepare failed with exit code 2; the command was: megalm nothing"


SAVER = """
import pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))
pathlib.Path(sys.argv[1], "started").touch()
end = time.monotonic() + 60
while not stop and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(1.5)
pathlib.Path(sys.argv[1], "saved").touch()
"""


def test_ctrl_c_waits_for_the_step_to_save(tmp_path):
    (tmp_path / "saver.py").write_text(SAVER)
    program = ("from megalm.tools import quickstart, _command;"
               f"quickstart.prepare = lambda: quickstart.step('train', ['saver', {str(tmp_path)!r}]);"
               "import sys; sys.exit(quickstart.main([]))")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(2):  # an impatient finger
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.3)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and error == "interrupted\n" and (tmp_path / "saved").exists()
