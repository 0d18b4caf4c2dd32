"""A model with the weights of a Hugging Face folder gives transformers' logits, within 1e-4, for every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.config import validate
from megalm.model import layers
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import part_slices
from megalm.plan import make_plan
from tests.model.transformers_weights import MODELS, PADDED, VOCAB, tokens

REFERENCE = ("gpt2", "llama-llama3", "mistral", "gpt_neox")
"""Between them everything that the operations' references do."""


def logits(section: dict, parts: dict[str, Tensor], token_ids: Tensor, backend: str) -> Tensor:
    """[b, s] -> [b, s, vocabulary], by one process that runs the layer list; every part must find its place."""
    config = validate({
        "model": section | {"vocab_multiple": PADDED, "dropout": 0.1, "attention_dropout": 0.1},
        "batch": {"micro": 1, "global": 1}, "precision": {"dtype": "fp32"}, "optimizer": {"lr": 1e-3},
        "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "none"}]}, "train": {"dir": "none", "steps": 1},
        "kernels": {"attention": backend, "norm": backend, "rotary": backend, "activation": backend},
    })  # fmt: skip
    plan = make_plan(config, 1)
    shared: dict = {}
    filled = set()
    x = token_ids
    for layer in layers(config, plan, TensorParallel(), StepContext(seed=1)):
        module = shared[layer.tied] if layer.tied in shared else layer.build().eval()
        if layer.tied:
            shared[layer.tied] = module
        for parameter in module.parameters():
            for part, view in part_slices(parameter, parameter.detach()):
                view.copy_(parts[part.name])
                filled.add(part.name)
        x = module(x) if layer.forward is None else layer.forward(module, x)
    assert filled == set(parts)
    hidden, weight = x
    return hidden.matmul(weight.t())[..., :VOCAB].transpose(0, 1)  # [s, b, V] -> [b, s, vocabulary]


@pytest.mark.parametrize("name, backend", [*((name, "torch") for name in MODELS), *((name, "reference") for name in REFERENCE)])
def test_logits_equal_transformers(name: str, backend: str) -> None:
    model, section, parts = MODELS[name]()
    with torch.no_grad():
        theirs = model(tokens()).logits
        ours = logits(section, parts, tokens(), backend)
    assert theirs.std() > 0.1, "the logits must differ enough for the comparison to mean something"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
