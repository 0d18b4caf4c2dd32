"""The one object that training reports to. Rank 0's writes everywhere; the other ranks' do nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from megalm.config import Config
from megalm.plan import Plan

from .console import open_console
from .jsonl import JsonLines, cut_back
from .plot import draw_loss
from .throughput import Throughput
from .trackers import open_trackers, reason


class Result(Protocol):
    """What the engine tells of a step: token-mean loss (nats), gradient norm before clipping, rate, whether it was skipped."""

    loss: float
    grad_norm: float
    skipped: bool
    lr: float


class Logger:
    """Console, metrics.jsonl, TensorBoard, wandb and loss.png of one run.

    Every logging.every-th step and the last one are logged (0: none); evaluations always. `first_step` is the step the run
    goes on from: records beyond it are moved to metrics.jsonl.old. Raises OSError where the run's folder can't be written; what
    goes wrong later is named on the console, and the training goes on.
    """

    def __init__(self, config: Config, plan: Plan, rank: int = 0, first_step: int = 0):
        self._config = config
        self._folder = Path(config.train.dir)
        self._writes = rank == 0
        if not self._writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_json(self._folder / "config.json", config.model_dump(mode="json"))
        _write_json(self._folder / "plan.json", plan.to_dict())
        cut_back(self._folder, first_step)
        self._console = open_console(first_step, config.train.steps)
        self._records = JsonLines(self._folder)
        self._trackers = open_trackers(config, self._folder, first_step, self.note)
        self._throughput = Throughput(config, plan)

    def step(self, step: int, result: Result, samples: int) -> None:
        """Step number `step` (from 1) has been done; `samples` have been trained on by now, those of earlier runs included."""
        if not self._writes:
            return
        self._throughput.step()
        self._console.progress(step, result.loss)
        if result.skipped:
            self.note(f"step {step} skipped: its loss or gradients are not finite")
        every = self._config.logging.every
        if every == 0 or not (step % every == 0 or step == self._config.train.steps):
            return
        record: dict[str, Any] = {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
        record["tokens"] = samples * self._config.model.seq_length
        record.update(self._throughput.report())
        if result.skipped:
            record["skipped"] = True
        self._console.logged(record)
        self._write(record)

    def evaluation(self, step: int, loss: float) -> None:
        """The token-mean validation loss (nats) after `step`; the time it took is left out of the throughput."""
        if not self._writes:
            return
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows at 709.8
        self._console.line(f"step {step} | validation loss {loss:.4f} | perplexity {perplexity:,.2f}")
        self._write({"step": step, "eval_loss": loss, "perplexity": perplexity})
        self._throughput.restart()

    def note(self, text: str) -> None:
        """A line for the reader of the console and the log."""
        if self._writes:
            self._console.line(f"megalm: {text}")

    def close(self) -> None:
        """Finish everything and draw loss.png; a second call does nothing."""
        if not self._writes:
            return
        self._writes = False
        finish = [("metrics.jsonl", self._records.close), *((name, tracker.close) for name, tracker in self._trackers.items()),
                  ("loss.png", lambda: draw_loss(self._folder))]
        for name, work in finish:
            try:
                work()
            except Exception as error:  # a missing font or a full disk is no failure of the training
                self._console.line(f"megalm: {name} could not be finished: {error}")
        self._console.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._records.write(record)
        except OSError as error:
            self.note(f"step {record['step']} is missing in metrics.jsonl: {error}")
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(record)
            except Exception as error:  # whatever a tracker's library raises, it isn't worth a training run
                del self._trackers[name]
                self.note(f"{name} is off from step {record['step']} on: {reason(error)}")


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
