"""The training steps of tools/gpu_check.py: a Llama-style model on one GPU through megalm's own engine, with a set of backends.

Tokens are synthetic, small numbers more often than large ones, so that the loss falls at once and 20 steps can be compared.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalm.config import Config, validate
from megalm.config.schema import Kernels
from megalm.data.loader import MicroBatch
from megalm.engine.engine import build
from megalm.metrics.devices import peak_flops
from megalm.model import choose_kernels, layers
from megalm.parallel.groups import start
from megalm.parallel.random import StepContext
from megalm.plan import flops, make_plan
from megalm.tools._ops import registered

SETS = ("megalm", "torch", "reference")
SCORES_LIMIT = 2048  # positions: beyond, the scores of all layers that plain attention keeps would not fit


@dataclass(frozen=True)
class Run:
    """A model, its batch, and the set of backends that it takes."""

    model: str
    kernels: str
    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocab: int
    seq: int
    micro: int
    batch: int
    steps: int = 20
    warmup: int = 5  # steps that are not timed

    def __str__(self) -> str:
        return f"{self.model} with {self.kernels}"


def _runs(model: str, sets: Sequence[str] = SETS, **sizes: int) -> list[Run]:
    return [Run(model, kernels, **sizes) for kernels in sets]


RUNS = [*_runs("1.2B", layers=16, hidden=2048, heads=32, groups=8, ffn=8192, vocab=128256, seq=4096, micro=2, batch=4),
        *_runs("3.2B", layers=28, hidden=3072, heads=24, groups=8, ffn=8192, vocab=128256, seq=4096, micro=1, batch=4)]
# Heads of 64, the smallest that the fused attention serves.
DRY_RUN = _runs("tiny", ("megalm", "reference"), layers=1, hidden=128, heads=2, groups=1, ffn=64, vocab=128, seq=8, micro=1,
                batch=2, steps=3, warmup=1)


def backends(run: Run) -> dict[str, str]:
    """The backend of every operation that a model names: of the run's set where there is one, else torch's."""
    chosen = {op: run.kernels if run.kernels in registered().backends[op] else "torch" for op in Kernels.model_fields}
    if run.kernels == "reference" and run.seq > SCORES_LIMIT:
        chosen["attention"] = "torch"
    return chosen


def config(run: Run) -> Config:
    return validate({
        "model": {
            "num_layers": run.layers, "hidden_size": run.hidden, "num_attention_heads": run.heads, "num_query_groups": run.groups,
            "seq_length": run.seq, "ffn_hidden_size": run.ffn, "vocab_size": run.vocab, "normalization": "rms_norm",
            "activation": "swiglu", "position_embedding": "rotary", "bias": False, "tie_embeddings": True,
        },
        "parallel": {"zero_stage": 1},
        "batch": {"micro": run.micro, "global": run.batch},
        "precision": {"dtype": "bf16"},
        "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_grad_norm": 1.0},
        "schedule": {"decay": "constant"},
        "kernels": backends(run),
        "tokenizer": {"type": "bytes"},
        "data": {"train": [{"path": "unused"}]},
        "train": {"dir": "unused", "steps": 1 << 30},
    })  # fmt: skip


def steps(run: Run) -> Iterator[list[MicroBatch]]:
    """Each step's micro-batches, the same ones for every set of backends: token n about as often as 1 / (n + 1)."""
    random = torch.Generator().manual_seed(1)
    samples = torch.arange(run.micro)
    while True:
        drawn = torch.rand(run.batch, run.seq + 1, generator=random, dtype=torch.float64)
        tokens = (torch.tensor(float(run.vocab)) ** drawn).long() - 1
        yield [MicroBatch(samples, part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(run.micro)]


def train(run: Run, device: str) -> dict[str, Any]:
    """Speed, memory and losses of a run; `skipped` where the GPU has not enough memory for it."""
    try:
        return _train(run, device)
    except torch.OutOfMemoryError as error:
        return {"model": run.model, "set": run.kernels, "skipped": str(error).splitlines()[0]}


def _train(run: Run, device: str) -> dict[str, Any]:
    made = config(run)
    chosen = choose_kernels(made, torch.device(device))
    plan = make_plan(made, 1)
    groups = start(plan, torch.device(device, 0) if device == "cuda" else torch.device(device))
    context = StepContext(made.train.seed)
    engine = build(made, plan, groups, context, layers(made, plan, groups.tp, context, groups.device))
    losses, seconds = [], []
    batches = steps(run)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(run.steps):
        batch, begin = next(batches), time.perf_counter()
        losses.append(engine.train_step(step, batch).loss)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    tokens, median = run.batch * run.seq, statistics.median(seconds[run.warmup:])
    return {"model": run.model, "set": run.kernels, "kernels": chosen, "parameters": sum(p.numel() for p in engine.parameters),
            "tokens": tokens, "step_seconds": median, "tokens_per_second": tokens / median, "losses": losses,
            **utilisation(made, plan.padded_vocab_size, tokens / median, device), **memory(device)}


def utilisation(made: Config, vocab: int, tokens_per_second: float, device: str) -> dict[str, Any]:
    """MFU by both counts: attention as the causal half of a square, and as the whole of it, which others report."""
    half = flops.per_token(made, vocab)
    whole = half + 3.0 * made.model.num_layers * flops.attention_core_forward(made)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if device == "cuda" else None
    mfu = {name: count * tokens_per_second / peak for name, count in (("mfu", half), ("mfu_full", whole))} if peak else {}
    return {"flops_per_token": half, "flops_per_token_full": whole, **mfu}


def memory(device: str) -> dict[str, int]:
    if device != "cuda":
        return {}
    return {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
