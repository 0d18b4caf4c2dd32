"""What a run leaves in its folder and on its console."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from megalm.metrics import Logger, draw_loss, read_metrics
from megalm.plan import make_plan
from tests.metrics.conftest import Result, make_config


def train(logger, first, last, **fields):
    for step in range(first + 1, last + 1):
        logger.step(step, Result(loss=5.0 / step, **fields), samples=10 + 4 * step)


def test_steps_and_evaluations_are_recorded(config, plan, tmp_path, capsys):
    logger = Logger(config, plan)
    train(logger, 0, 4)
    logger.evaluation(4, 2.0)
    logger.close()
    two, four, valid = read_metrics(tmp_path)
    assert (two["step"], two["loss"], two["grad_norm"], two["lr"], two["tokens"]) == (2, 2.5, 0.5, 1e-3, (10 + 2 * 4) * 8)
    assert four["tokens_per_second"] == pytest.approx(4 * 8 / four["step_seconds"])
    assert "mfu" not in four  # no GPU here whose peak is known
    assert valid == {"step": 4, "eval_loss": 2.0, "perplexity": math.exp(2.0)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step  2/10 | loss 2.5000 | grad norm 0.500 | lr 1.00e-03 | ")
    assert lines[2] == "step 4 | validation loss 2.0000 | perplexity 7.39"


def test_every_line_is_on_disk_at_once(config, plan, tmp_path):
    logger = Logger(config, plan)
    train(logger, 0, 2)
    assert len(read_metrics(tmp_path)) == 1
    logger.close()


def test_the_last_step_is_logged_and_zero_means_never(tmp_path):
    for every, steps in ((3, [3, 6, 9, 10]), (0, [])):
        folder = tmp_path / str(every)
        config = make_config(folder, every=every)
        logger = Logger(config, make_plan(config, 1, 257))
        train(logger, 0, 10)
        logger.close()
        assert [record["step"] for record in read_metrics(folder)] == steps


def test_numbers_that_are_not_finite_are_null(config, plan, tmp_path, capsys):
    logger = Logger(config, plan)
    logger.step(1, Result(loss=1.0), samples=4)
    logger.step(2, Result(loss=math.nan, grad_norm=math.inf, skipped=True), samples=8)
    logger.evaluation(2, 1000.0)
    logger.close()
    step, valid = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert step["loss"] is None and step["grad_norm"] is None and step["skipped"] is True
    assert valid["perplexity"] is None
    assert "step 2 skipped" in capsys.readouterr().out


def test_a_resume_cuts_back_and_keeps_the_rest(config, plan, tmp_path):
    logger = Logger(config, plan)
    train(logger, 0, 8)
    logger.evaluation(8, 3.0)
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # a crash in the middle of a line
    logger = Logger(config, plan, first_step=4)
    train(logger, 4, 10)
    logger.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4, 6, 8, 10]
    old = (tmp_path / "metrics.jsonl.old").read_text().splitlines()
    assert len(old) == 4 and '"eval_loss": 3.0' in old[2] and old[3].startswith('{"step": 10')


def test_other_ranks_write_nothing(config, plan, tmp_path, capsys):
    logger = Logger(config, plan, rank=1)
    train(logger, 0, 4)
    logger.evaluation(4, 2.0)
    logger.note("a note")
    logger.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_run_folder_says_what_ran(config, plan, tmp_path):
    Logger(config, plan).close()
    assert json.loads((tmp_path / "config.json").read_text())["batch"]["global"] == 4
    assert json.loads((tmp_path / "plan.json").read_text())["padded_vocab_size"] == plan.padded_vocab_size


def test_a_full_disk_does_not_end_the_training(config, plan, capsys):
    logger = Logger(config, plan)
    logger._records._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    train(logger, 0, 4)
    assert "step 2 is missing in metrics.jsonl: " in capsys.readouterr().out


def test_tensorboard(tmp_path):
    config = make_config(tmp_path, tensorboard=True)
    logger = Logger(config, make_plan(config, 1, 257))
    train(logger, 0, 4)
    logger.evaluation(4, 2.0)
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 2.5), (4, 1.25)]
    assert [event.step for event in events.Scalars("valid/eval_loss")] == [4]


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = make_config(tmp_path, wandb={"project": "megalm", "mode": "offline"})
    logger = Logger(config, make_plan(config, 1, 257))
    train(logger, 0, 4)
    logger.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert (tmp_path / "wandb_id.txt").read_text().strip() in run.name
    assert b"train/loss" in run.read_bytes()


def test_a_tracker_that_fails_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("no account")

    monkeypatch.setattr(wandb, "init", refuse)
    config = make_config(tmp_path, wandb={"project": "megalm", "mode": "online"})
    logger = Logger(config, make_plan(config, 1, 257))
    train(logger, 0, 2)
    logger.close()
    assert "wandb is off: no account" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)) == 1


def test_a_tracker_that_fails_later_is_named_once_and_left_out(tmp_path, capsys):
    """The others go on, and so does the training."""
    config = make_config(tmp_path, tensorboard=True, every=1)
    logger = Logger(config, make_plan(config, 1, 257))
    written, closed = [], []

    def fail(record):
        raise ConnectionError("the network is gone")

    logger._trackers = {"wandb": SimpleNamespace(write=fail, close=lambda: closed.append(True)), **logger._trackers,
                        "third": SimpleNamespace(write=written.append, close=lambda: None)}
    train(logger, 0, 3)
    logger.close()
    out = capsys.readouterr().out
    assert out.count("the network is gone") == 1 and "wandb is off from step 1 on: the network is gone" in out
    assert [record["step"] for record in written] == [1, 2, 3] and not closed
    assert len(read_metrics(tmp_path)) == 3


def test_loss_png_is_drawn(config, plan, tmp_path):
    assert draw_loss(tmp_path) is None
    logger = Logger(config, plan)
    train(logger, 0, 10)
    logger.evaluation(10, 2.0)
    logger.close()
    picture = tmp_path / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = picture.read_bytes()
    assert draw_loss(tmp_path, unigram_entropy=3.0) == picture
    assert picture.read_bytes() != before
