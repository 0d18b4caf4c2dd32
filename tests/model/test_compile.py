"""train.compile: the same numbers from one compilation that serves all layers and steps, under dropout and recomputation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytest import MonkeyPatch
from torch._dynamo.utils import counters

from megalm.config import validate
from megalm.data.loader import MicroBatch
from megalm.engine.engine import build
from megalm.model import layers
from megalm.ops import sdpa
from megalm.parallel.groups import TensorParallel, start
from megalm.parallel.random import StepContext
from megalm.plan import make_plan
from tests import dist

STEPS, SEQ, BATCH, VOCAB = 3, 16, 4, 64


def config(compiled: bool, mode: str = "none", dropout: float = 0.1, num_layers: int = 4, **parallel):
    return validate({
        "model": {"num_layers": num_layers, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": SEQ,
                  "vocab_size": VOCAB, "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary",
                  "bias": False, "dropout": dropout, "attention_dropout": dropout},
        "parallel": parallel, "batch": {"micro": 2, "global": BATCH}, "recompute": {"mode": mode},
        "optimizer": {"lr": 1e-2}, "precision": {"dtype": "fp32"},
        "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "unused"}]},
        "train": {"dir": "unused", "steps": STEPS, "compile": compiled},
    })  # fmt: skip


def quick_compiler(patch: MonkeyPatch) -> None:
    """Everything of torch.compile but the code generation, which takes seconds a graph."""
    torch._dynamo.reset()
    counters.clear()
    patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def run_layers(settings) -> list[torch.Tensor]:
    """Outputs of the transformer layers at each step, then all gradients."""
    plan, context = make_plan(settings, 1), StepContext(7)
    described = layers(settings, plan, TensorParallel(), context)
    modules = [layer.build().train() for layer in described if layer.name.startswith("layers.")]
    outputs = []
    for step in range(STEPS):
        hidden = torch.randn(SEQ, BATCH, 32, generator=torch.Generator().manual_seed(step)).requires_grad_()
        context.set(step, torch.arange(BATCH) + BATCH * step)
        for module in modules:
            hidden = module(hidden)
        outputs.append(hidden)
        # Under a pipeline the context has moved on by the time a layer is recomputed.
        context.set(step + 1, torch.zeros(BATCH, dtype=torch.int64))
        hidden.square().sum().backward()
    return outputs + [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_one_graph_serves_all_layers_and_steps(mode, monkeypatch):
    expected = run_layers(config(False, mode))
    quick_compiler(monkeypatch)
    found = run_layers(config(True, mode))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_sdpa_whose_gradients_have_orders_is_called_between_compiled_parts(monkeypatch):
    """As on a GPU: compiled code has no place where torch's switch could be on for its gradient alone."""
    monkeypatch.setattr(sdpa, "has_orders", lambda device: True)
    expected = run_layers(config(False, dropout=0.0))
    quick_compiler(monkeypatch)
    orders, ask = [], sdpa._in_order
    monkeypatch.setattr(sdpa, "_in_order", lambda *call: orders.append(torch.compiler.is_compiling()) or ask(*call))
    monkeypatch.setattr(sdpa, "kernel", lambda *call: "flash")
    found = run_layers(config(True, dropout=0.0))
    assert orders == [False] * 4 * STEPS and counters["stats"]["unique_graphs"] > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def train(rank: int, world: int, parallel: dict, mode: str) -> tuple[list[float], list[float], int]:
    """(losses and gradient norms of an eager run, of a compiled one, graphs compiled)."""
    with MonkeyPatch.context() as patch:
        quick_compiler(patch)
        eager, compiled = (train_once(world, config(on, mode, num_layers=2, **parallel)) for on in (False, True))
    return eager, compiled, counters["stats"]["unique_graphs"]


def train_once(world: int, settings) -> list[float]:
    plan = make_plan(settings, world)
    groups, context = start(plan, torch.device("cpu")), StepContext(7)
    engine = build(settings, plan, groups, context, layers(settings, plan, groups.tp, context))
    found = []
    for step in range(STEPS):
        tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
        pieces = zip(torch.arange(BATCH).split(2), tokens.split(2), strict=True)
        batches = [MicroBatch(samples, piece[:, :-1], piece[:, 1:]) for samples, piece in pieces]
        result = engine.train_step(step, batches[groups.place.dp::plan.dp])
        found += [result.loss, result.grad_norm]
    return found


@pytest.mark.parametrize("parallel, mode", [
    ({"tp": 2, "sequence_parallel": True}, "selective"), ({"pp": 2}, "full"), ({"dp": 2, "zero_stage": 3}, "none"),
], ids=["tp2-sp", "pp2", "zero3"])
def test_layouts(parallel, mode):
    for eager, compiled, graphs in dist.run(train, 2, parallel, mode, timeout=180):
        assert graphs > 0
        assert compiled == pytest.approx(eager, rel=1e-5)


def test_generated_code():
    """The default compiler, code generation included."""
    torch._dynamo.reset()
    expected, found = run_layers(config(False, dropout=0.0)), run_layers(config(True, dropout=0.0))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
