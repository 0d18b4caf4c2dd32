"""A Transformer layer on the kernels, through the shim: the numbers of plain torch, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from megalm.config import validate
from megalm.model import layers
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.plan import make_plan
from megalm.plan.activations import layer_activations
from megalm.tools.kernel_cases.accuracy import judge
from tests.config.trees import config as small_config
from tests.model.test_compile import quick_compiler
from tests.plan.live import saved_by_a_layer

SEQ, BATCH, HIDDEN, STEPS = 8, 2, 32, 2
KERNELS = ("norm", "activation", "dropout")
STYLES = {
    "gpt2": {"activation": "gelu"},
    "llama": {"normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary", "bias": False},
    "geglu": {"normalization": "rms_norm", "activation": "geglu"},
}


def config(style: str, backend: str, compiled: bool = False, mode: str = "none", dropout: float = 0.1, **attention):
    """attention: what its head dim, and the backend beside KERNELS, take."""
    hidden, kernels = attention.get("hidden", HIDDEN), (*KERNELS, *(["attention"] if attention else []))
    return validate({
        "model": {"num_layers": 2, "hidden_size": hidden, "num_attention_heads": attention.get("heads", 4), "seq_length": SEQ,
                  "vocab_size": 64, "ffn_hidden_size": 48, "dropout": dropout, **STYLES[style]},
        "batch": {"micro": BATCH, "global": BATCH}, "recompute": {"mode": mode}, "optimizer": {"lr": 1e-2},
        "precision": {"dtype": "fp32"}, "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "unused"}]},
        "train": {"dir": "unused", "steps": STEPS, "compile": compiled}, "kernels": dict.fromkeys(kernels, backend),
    })  # fmt: skip


def run(settings, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Outputs of position and transformer layers at each step, then all gradients."""
    context = StepContext(7)
    described = layers(settings, make_plan(settings, 1), TensorParallel(), context)
    modules = [layer.build().to(dtype).train() for layer in described if layer.name.startswith(("position", "layers."))]
    outputs = []
    for step in range(STEPS):
        hidden = torch.randn(SEQ, BATCH, settings.model.hidden_size, generator=torch.Generator().manual_seed(step))
        hidden = hidden.to(dtype).requires_grad_()
        context.set(step, torch.arange(BATCH) + BATCH * step)
        for module in modules:
            hidden = module(hidden)
        outputs.append(hidden)
        hidden.square().sum().backward()
    return outputs + [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("rotary, compiled", [("megalm", False), ("megalm", True), ("torch", True)])
def test_a_layer_keeps_what_the_plan_says_of_its_rotary(shim, rotary, compiled, monkeypatch):
    """In place in eager mode; compiled code turns it into one new tensor, and lets go of the projection."""
    quick_compiler(monkeypatch)
    kernels = {**dict.fromkeys(("attention", "norm", "activation", "softmax", "dropout"), "torch"), "rotary": rotary}
    sections = {"model": {"hidden_size": 256, "num_query_groups": 2, "seq_length": 64, **STYLES["llama"]}, "batch": {"micro": 2},
                "precision": {"dtype": "bf16"}, "kernels": kernels, "train": {"compile": compiled}}
    planned = small_config(**sections)
    estimate = layer_activations(planned, make_plan(planned, 1), "none")
    # Torch's swiglu keeps silu of the gate on a CPU, where it is not compiled.
    estimate += 0 if compiled else 2 * 64 * planned.model.ffn_hidden_size * 2
    assert saved_by_a_layer(0, 1, sections) == pytest.approx(estimate, rel=0.015)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("style", STYLES)
def test_the_numbers_are_those_of_torch(shim, style, dropout):
    expected = run(config(style, "torch", dropout=dropout))
    torch.testing.assert_close(run(config(style, "megalm", dropout=dropout)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_one_graph_serves_all_layers_and_steps(shim, mode, monkeypatch):
    expected = run(config("llama", "megalm"))
    quick_compiler(monkeypatch)
    found = run(config("llama", "megalm", compiled=True, mode=mode))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_fused_attention_inside_a_model(shim, style, monkeypatch):
    """A head dim and dtype that it serves: bf16 as near to fp32 as plain torch's."""
    monkeypatch.setattr("megalm.ops.attention._with_scores", None)  # what serves the others
    shape = {"hidden": 128, "heads": 2}
    exact = run(config(style, "torch", dropout=0.0, **shape))
    plain = run(config(style, "torch", dropout=0.0, **shape), torch.bfloat16)
    ours = run(config(style, "megalm", dropout=0.0, **shape), torch.bfloat16)
    results = zip(ours, plain, exact, strict=True)
    judge([tuple(tensor.detach().double() for tensor in each) for each in results], torch.bfloat16)
