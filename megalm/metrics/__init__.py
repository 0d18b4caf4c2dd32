"""What a run reports: console, metrics.jsonl, TensorBoard, wandb and loss.png, all from rank 0."""

from __future__ import annotations

from .devices import peak_flops
from .jsonl import cut_back, read_metrics
from .logger import Logger
from .plot import draw_loss

__all__ = ["Logger", "cut_back", "draw_loss", "peak_flops", "read_metrics"]
