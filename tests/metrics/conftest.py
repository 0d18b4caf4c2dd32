"""A small config and its plan, the run folder in tmp_path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megalm.config import Config
from megalm.config.load import validate
from megalm.plan import make_plan


@dataclass(frozen=True)
class Result:
    loss: float
    grad_norm: float = 0.5
    skipped: bool = False
    lr: float = 1e-3


def make_config(folder: Path, **logging) -> Config:
    return validate(
        {
            "model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8},
            "batch": {"micro": 1, "global": 4},
            "precision": {"dtype": "fp32"},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "tokenizer": {"type": "bytes"},
            "data": {"train": [{"path": "nowhere"}]},
            "train": {"dir": str(folder), "steps": 10},
            "logging": {"every": 2, **logging},
        }
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def plan(config: Config):
    return make_plan(config, 1, 257)
