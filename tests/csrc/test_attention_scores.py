"""Attention by its scores with the kernels, and the model's attention layer with rotary positions turned in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalm.model import layers
from megalm.ops.attention import attention
from megalm.ops.library import use_shim
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.ops.registry import REGISTRY, Features
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.plan import activations, make_plan
from megalm.tools.kernel_cases.accuracy import assert_within_twice, randn
from tests import dist
from tests.config.trees import config
from tests.plan.live import saved_by_a_layer

KEY = DropoutKey(1, 2, 3, ATTENTION_SCORES)
SHAPES = [(9, 9, 2, 4, 2, 8), (5, 12, 1, 6, 2, 5), (9, 4, 2, 4, 1, 8), (1, 7, 2, 2, 2, 8)]  # s, s_k, b, H, G, d


def inputs(shape):
    s, s_k, b, h, g, d = shape
    return [randn(s, b, h, d), randn(s_k, b, g, d, seed=1), randn(s_k, b, g, d, seed=2)]


def call(backend, softmax=None, **options):
    return lambda q, k, v: attention(q, k, v, backend=backend, softmax=softmax or backend, **options)


def plain(q, k, v):
    """SDPA's own arithmetic, which keeps the scores in the input's dtype."""
    s, s_k, group = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    query, key, value = (x.permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)))
    hidden = ~torch.ones(s, s_k, dtype=torch.bool).tril(s_k - s)
    scores = (query @ key.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
    return (scores.softmax(-1).masked_fill(hidden, 0.0) @ value).permute(2, 0, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shim, shape, dtype):
    s, _, b, h, _, d = shape
    assert_within_twice(call("megalm"), plain, call("reference"), inputs(shape), randn(s, b, h, d, seed=3), dtype)


@pytest.mark.parametrize("options", [{}, dict(causal=False, scale=0.3), dict(dropout=0.3, key=KEY, samples=torch.tensor([4, 7]))])
def test_it_is_the_reference(shim, options):
    """In float64, dropout included, whose mask is the same."""
    tensors = [tensor.requires_grad_() for tensor in inputs((6, 6, 2, 4, 2, 8))]
    got, expected = call("megalm", **options)(*tensors), call("reference", **options)(*tensors)
    torch.testing.assert_close(got, expected)
    grad = randn(*got.shape, seed=3)
    torch.testing.assert_close(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad))


def test_keys_and_values_are_not_repeated_and_probabilities_are_kept_once(shim):
    """Two groups of four heads: what is kept is operands of their own size, and the probabilities."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor):
        call("megalm")(*(tensor.bfloat16().requires_grad_() for tensor in inputs((32, 32, 1, 8, 2, 4))))
    assert sum(tensor.numel() for tensor in kept.values()) == 8 * 32 * 32 + 32 * 4 * (8 + 2 + 2)


def test_long_vectors_in_fp16_do_not_overflow(shim):
    q = torch.full((2, 1, 1, 64), 48.0, dtype=torch.float16)  # q k = 147456, beyond fp16; scaled it is 18432
    assert call("megalm")(q, q, q).isfinite().all()


def test_the_softmax_backend_is_named_apart(shim):
    tensors = inputs((4, 4, 1, 2, 2, 8))
    torch.testing.assert_close(call("megalm", softmax="torch")(*tensors), call("megalm")(*tensors))
    with pytest.raises(ValueError, match="kernels.softmax is 'liger'"):
        call("megalm", softmax="liger")(*tensors)


def test_a_gpu_takes_it_under_dropout(monkeypatch):
    backend = REGISTRY.backends["attention"]["megalm"]
    monkeypatch.setitem(REGISTRY.backends["attention"], "megalm", replace(backend, missing=lambda features: None))
    monkeypatch.setattr(REGISTRY, "chosen", {})
    features = Features("cuda", torch.bfloat16)
    assert REGISTRY.choose("attention", "auto", features)[0] is REGISTRY.backends["attention"]["torch"].run
    run, reason = REGISTRY.choose("attention", "auto", features._replace(traits=("dropout",)))
    assert run is backend.run and "not torch" in reason


def test_no_graph_break(shim):
    tensors = [tensor.float().requires_grad_() for tensor in inputs((6, 6, 2, 4, 2, 8))]
    function = call("megalm", dropout=0.3, key=KEY, samples=torch.tensor([4, 7]))
    got, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors), function(*tensors)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 6, "vocab_size": 64,
         "position_embedding": "rotary", "normalization": "rms_norm", "activation": "swiglu", "attention_dropout": 0.2}


def run_layers(backend: str, mode: str, **model) -> list[torch.Tensor]:
    """What two layers give, and every gradient."""
    kernels = dict.fromkeys(("attention", "softmax", "rotary"), backend)
    settings = config(model={**MODEL, **model}, kernels=kernels, recompute={"mode": mode}, precision={"dtype": "fp32"})
    context = StepContext(7)
    context.set(3, torch.arange(2))
    modules = [layer.build().train() for layer in layers(settings, make_plan(settings, 1), TensorParallel(), context)
               if layer.name.startswith("layers.")]
    hidden = randn(6, 2, 32).float().requires_grad_()
    first, out = hidden, hidden
    for module in modules:
        out = module(out)
    out.sin().sum().backward()
    return [out, first.grad, *(parameter.grad for module in modules for parameter in module.parameters())]


@pytest.mark.parametrize("model", [{}, {"bias": False}, {"qk_norm": True}])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_model_gives_the_same(shim, mode, model):
    for got, expected in zip(run_layers("megalm", mode, **model), run_layers("reference", mode, **model), strict=True):
        torch.testing.assert_close(got, expected)


def saved_with_shim(rank: int, world: int, library: str, sections: dict) -> int:
    use_shim(Path(library))
    return saved_by_a_layer(rank, world, sections)


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("head_dim", [64, 48])
def test_a_layer_keeps_what_the_plan_says(shim_library, head_dim, qk_norm, attention_dropout):
    """Rotated in place, queries and keys are kept once; of scores only what no kernel does without, in the model's dtype."""
    sections = {"model": {**MODEL, "hidden_size": 4 * head_dim, "seq_length": 128, "activation": "gelu", "ffn_hidden_size": 512,
                          "qk_norm": qk_norm, "attention_dropout": attention_dropout},
                "precision": {"dtype": "bf16"}, "batch": {"micro": 2}, "recompute": {"mode": "none"},
                "kernels": dict.fromkeys(("attention", "softmax", "rotary"), "megalm")}
    planned = config(**sections)
    estimate = activations.layer_activations(planned, make_plan(planned, 1), "none")
    live, = dist.run(saved_with_shim, 1, str(shim_library), sections)
    assert estimate == pytest.approx(live, rel=0.03)
