"""data.document_mask and data.reset_positions: a packed sample's documents know nothing of each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megalm.config import ConfigError
from megalm.model import choose_kernels, layers
from megalm.ops.attention import packed_documents
from megalm.ops.registry import REGISTRY
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.plan import make_plan
from megalm.plan.backends import attention_traits
from tests.config.trees import config
from tests.model.test_compile import quick_compiler

MODEL = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 24, "vocab_size": 64,
         "init_std": 0.3}
STYLES = {
    "gpt2": MODEL,
    "llama": {**MODEL, "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary", "bias": False,
              "tie_embeddings": False, "qk_norm": True},
}
BOTH = {"document_mask": True, "reset_positions": True}
LENGTHS = ((5, 1, 11, 7), (24,), (1, 1, 2, 20))  # of the documents of three samples


def starts(lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    """int32 [b, s], as the loader gives it."""
    rows = [[first for first, length in zip(itertools.accumulate(row, initial=0), row, strict=False) for _ in range(length)]
            for row in lengths]
    return torch.tensor(rows, dtype=torch.int32)


class Model:
    """The layers of a config, in evaluation, from tokens [b, s] to logits [b, s, V]."""

    def __init__(self, style: str, data: dict, **sections):
        settings = config(model=STYLES[style], data=data, precision={"dtype": "fp32"}, **sections)
        self.context = StepContext(7)
        described = layers(settings, make_plan(settings, 1), TensorParallel(), self.context)
        tied = described[0].build().eval()
        self.layers = [layer.build().eval() if layer.tied is None else tied for layer in described[1:-1]]
        self.embedding = tied
        self.head = tied if described[-1].tied else described[-1].build()

    @torch.no_grad()
    def logits(self, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
        self.context.set(0, torch.arange(len(tokens)), document_starts)
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return (hidden @ self.head.weight.t()).transpose(0, 1)


@pytest.mark.parametrize("attention", ["torch", "reference"])
@pytest.mark.parametrize("style", STYLES)
def test_a_packed_document_is_the_document_alone(style, attention):
    kernels = {"kernels": {"attention": attention}}
    packed, alone = Model(style, BOTH, **kernels), Model(style, {}, **kernels)
    tokens = torch.randint(64, (3, 24), generator=torch.Generator().manual_seed(1))
    together = packed.logits(tokens, starts(LENGTHS))
    assert together.std() > 0.1
    for row, whole, lengths in zip(tokens, together, LENGTHS, strict=True):
        for document, logits in zip(row.split(lengths), whole.split(lengths), strict=True):
            torch.testing.assert_close(logits[None], alone.logits(document[None]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", STYLES)
def test_each_key_does_its_own(style):
    """The mask keeps the positions of the sample, positions leave other documents in sight; a single document feels neither."""
    tokens = torch.randint(64, (3, 24), generator=torch.Generator().manual_seed(2))
    other = tokens.clone()
    other[0, :5] = (other[0, :5] + 1) % 64  # the first document of the first sample
    found = {}
    for name, data in {"none": {}, "both": BOTH, **{key: {key: True} for key in BOTH}}.items():
        model = Model(style, data)
        found[name] = model.logits(tokens, starts(LENGTHS))
        unmoved = torch.equal(found[name][0, 5:], model.logits(other, starts(LENGTHS))[0, 5:])
        assert unmoved == ("document_mask" in data), name
        torch.testing.assert_close(found[name][1], found["none"][1], atol=1e-5, rtol=0)
    for one, two in itertools.combinations(found, 2):
        # Rotary positions are relative: within a document it makes no difference where they start.
        same = style == "llama" and {one, two} == {"document_mask", "both"}
        assert torch.allclose(found[one], found[two], atol=1e-4) == same, (one, two)


def test_a_micro_batch_that_says_nothing_of_documents_is_noticed():
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    for key in BOTH:
        with pytest.raises(AssertionError, match=f"data.{key} without the micro-batch's documents"):
            Model("gpt2", {key: True}).logits(tokens)


@pytest.mark.parametrize("sections", [{}, {"model": {"hidden_size": 512}}, {"model": {"attention_dropout": 0.1}},
                                      {"model": {"hidden_size": 512, "sliding_window": 3}},
                                      {"model": {"hidden_size": 512, "attention_dropout": 0.1}}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_traits_of_a_config_are_those_of_its_calls(sections, dtype, masked, monkeypatch):
    """What is chosen before a run, and what the plan counts on, is what runs."""
    model = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "seq_length": 4,
             **sections.get("model", {})}
    settings = config(model=model, precision={"dtype": dtype}, data={"document_mask": masked})
    context, asked = StepContext(7), []
    layer = layers(settings, make_plan(settings, 1), TensorParallel(), context)[2].build().train()
    choose = type(REGISTRY).choose
    monkeypatch.setattr(type(REGISTRY), "choose", lambda self, op, name, features: asked.append((op, features)) or choose(
        self, op, name, features))
    context.set(0, torch.arange(2), starts(((1, 3), (4,))) if masked else None)
    layer(torch.randn(4, 2, model["hidden_size"], dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])))
    assert [features.traits for op, features in asked if op == "attention"] == [attention_traits(settings)]


def test_a_backend_without_documents_is_an_error_before_the_run():
    settings = config(precision={"dtype": "bf16"}, data={"document_mask": True}, kernels={"attention": "flash_attn"},
                      train={"compile": True})  # compiled code doesn't know their lengths
    with pytest.raises(ConfigError, match="kernels.attention is 'flash_attn', .* flash_attn takes documents by their lengths"):
        choose_kernels(settings, torch.device("cuda"))


def test_documents_are_found_once_for_all_layers():
    context = StepContext(7)
    context.set(3, torch.arange(3), starts(LENGTHS))
    place = context.place
    assert place.documents.lengths == LENGTHS and torch.equal(place.documents.first, starts(LENGTHS))
    assert place.positions.shape == (24, 3) and place.positions.t()[2].tolist() == [0, 0, 0, 1, *range(20)]
    assert place.traceable().documents.lengths is None and packed_documents(starts(((24,),)), "cpu").lengths == ((24,),)


def test_one_graph_serves_all_documents(monkeypatch):
    """Compiled code goes by bounds that are tensors: other documents are no other code."""
    quick_compiler(monkeypatch)
    tokens = torch.randint(64, (3, 24), generator=torch.Generator().manual_seed(3))
    eager, compiled = Model("llama", BOTH), Model("llama", BOTH, train={"compile": True})
    for lengths in (LENGTHS, LENGTHS[::-1], ((24,), (12, 12), (23, 1))):
        torch.testing.assert_close(compiled.logits(tokens, starts(lengths)), eager.logits(tokens, starts(lengths)))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
