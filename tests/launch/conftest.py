"""A config on disk for every test of the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.launcher import Launcher


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A valid config for tp 2 x pp 2 x dp 1 whose run folder is tmp_path/run."""
    tree = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8},
        "parallel": {"tp": 2, "pp": 2},
        "batch": {"micro": 1, "global": 4},
        "precision": {"dtype": "fp32"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "tokenizer": {"type": "bytes"},
        "data": {"train": [{"path": "nowhere"}]},
        "train": {"dir": str(tmp_path / "run"), "steps": 1},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def launcher(tmp_path: Path, config_file: Path):
    """The launcher as a fresh process."""
    with Launcher(tmp_path, config_file) as launcher:
        yield launcher
