"""The optional trackers: TensorBoard and Weights & Biases. Each has `write(record)` and `close()`."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.config import Config

WANDB_SECONDS = 30  # for an online run to answer; training doesn't wait longer for it
NOT_SHOWN = ("step",)


def open_trackers(config: Config, folder: Path, first_step: int, note: Callable[[str], None]) -> dict[str, Any]:
    """The trackers that the config asks for, by name. One that can't be opened is left out, and `note` is told."""
    wanted: list[tuple[str, Callable[[], Any]]] = []
    if config.logging.tensorboard:
        wanted.append(("tensorboard", lambda: TensorBoard(folder, first_step)))
    if config.logging.wandb is not None:
        wanted.append(("wandb", lambda: Wandb(config, folder)))
    opened = {}
    for name, make in wanted:
        try:
            opened[name] = make()
        except Exception as error:  # whatever a tracker's library raises, it isn't worth a training run
            note(f"{name} is off: {reason(error)}")
    return opened


def reason(error: Exception) -> str:
    """What a library said, or else the kind of its error."""
    return str(error).strip() or type(error).__name__


def shown(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, under a heading: train/loss, train/..., valid/eval_loss, valid/perplexity."""
    heading = "valid" if "eval_loss" in record else "train"
    numbers = {key: value for key, value in record.items() if key not in NOT_SHOWN and isinstance(value, int | float)}
    return {f"{heading}/{key}": float(value) for key, value in numbers.items() if math.isfinite(value)}


class TensorBoard:
    """Event files in tensorboard/ of the run's folder; what an earlier run wrote beyond `first_step` is hidden."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in shown(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One wandb run for the run's folder, its id kept in wandb_id.txt there, so that a resumed run goes on in it."""

    def __init__(self, config: Config, folder: Path):
        import wandb

        section = config.logging.wandb
        path = folder / "wandb_id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=section.project,
            name=section.name,
            mode=section.mode,
            dir=str(folder),
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
            # The console is the launcher's, and nobody answers a question that a rank asks.
            settings=wandb.Settings(init_timeout=WANDB_SECONDS, console="off", silent=True, login_timeout=1),
        )

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(shown(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
