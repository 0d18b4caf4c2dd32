"""A tiny corpus, a tiny config, and training runs of it on forked ranks, for the tests of the whole path."""

from __future__ import annotations

import functools
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm import train
from megalm.data import IndexedWriter
from megalm.engine.engine import Engine
from megalm.parallel.random import StepContext
from tests import dist

DOCUMENTS = 40
Change = Callable[[Engine, StepContext], None]
"""What a test does to a rank's engine once it is built; picklable."""


def write_corpus(prefix: Path, seed: int = 0) -> None:
    """Byte documents with some structure, each ended by the end-of-document token 256."""
    random = np.random.RandomState(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(DOCUMENTS):
            words = random.randint(97, 123, size=(8, 5))
            text = words[random.randint(0, 8, size=random.randint(4, 40))].reshape(-1)
            writer.add_document(np.append(text, 256).astype(np.uint16))


def config(folder: Path, **sections: dict) -> dict[str, Any]:
    """The tiny config as the JSON's content; `sections` are merged over it. Its corpus is written if it isn't there."""
    for name in ("train", "valid"):
        if not (folder / f"{name}.idx").exists():
            write_corpus(folder / name, seed=len(name))
    base = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64,
                  "seq_length": 16, "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary",
                  "bias": False, "dropout": 0.1, "attention_dropout": 0.1},
        "parallel": {"dp": 1},
        "batch": {"micro": 2, "global": 8},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 5e-3, "clip_grad_norm": 0.5},
        "tokenizer": {"type": "bytes"},
        "data": {"train": [{"path": str(folder / "train")}], "valid": [{"path": str(folder / "valid")}]},
        "train": {"dir": str(folder / "run"), "steps": 6, "eval_samples": 8},
        "logging": {"every": 1},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}


def write_config(folder: Path, **sections: dict) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config(folder, **sections)))
    return path


def run_rank(rank: int, world: int, path: str, overrides: list[str], changes: tuple[Change, ...] = ()) -> tuple[int, str]:
    """(exit code, what it said on stderr) of megalm.train.run. It leaves no thread behind."""
    said, build = [], train.build

    def changed(config, plan, groups, context, layers):
        engine = build(config, plan, groups, context, layers)
        for change in changes:
            change(engine, context)
        return engine

    train.build = changed
    write = sys.stderr.write
    sys.stderr.write = lambda text: (said.append(text), write(text))[1]
    try:
        return train.run(path, overrides), "".join(said)
    finally:
        sys.stderr.write = write
        assert [thread.name for thread in threading.enumerate() if thread.name == "megalm-loader"] == []


def poison_gradients(engine: Engine, context: StepContext, steps: tuple[int, ...]) -> None:
    """Make one parameter's gradient on rank 0 non-finite at these steps (from 0), as a bad batch or a broken device would."""
    if engine.groups.rank == 0:
        engine.parameters[0].register_hook(lambda grad: grad * float("nan") if context.place.step in steps else grad)


def start(world: int, path: Path, *overrides: str, poisoned: tuple[int, ...] = (), changes: tuple[Change, ...] = (),
          timeout: float = 90) -> list[tuple[int, str]]:
    """(exit code, stderr) of every rank; gradients are NaN at the poisoned steps (from 0)."""
    changes += (functools.partial(poison_gradients, steps=poisoned),) if poisoned else ()
    return dist.run(run_rank, world, str(path), list(overrides), changes, timeout=timeout)


def records(folder: Path) -> list[dict]:
    """The lines of the run's metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds", "mfu")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint, by file and key."""
    from safetensors.torch import load_file

    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}
