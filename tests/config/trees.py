"""Configs for tests: a small complete one, and any section's keys over it."""
from __future__ import annotations

import copy
from typing import Any

from megalm.config import Config, validate

SMALL: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "seq_length": 32, "vocab_size": 300},
    "batch": {"micro": 1, "global": 8},
    "optimizer": {"lr": 1e-3},
    "tokenizer": {"type": "bytes"},
    "data": {"train": [{"path": "data/train"}]},
    "train": {"dir": "runs/test", "steps": 10},
}


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """SMALL with the keys of the named sections put over it."""
    result = copy.deepcopy(SMALL)
    for section, keys in sections.items():
        result[section] = {**result.get(section, {}), **keys}
    return result


def config(**sections: dict[str, Any]) -> Config:
    return validate(tree(**sections))
