"""The jobs of the parity proof: every layout for both styles, and every other axis once on a 3D and on a flat layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tests.parity.data import GLOBAL_BATCH, SEQ_LENGTH

STEPS = 10
SEED = 1234
VOCAB = 256

_MODEL = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "seq_length": SEQ_LENGTH,
    "vocab_size": VOCAB, "dropout": 0.1, "attention_dropout": 0.1, "init_std": 0.05,
}  # fmt: skip
STYLES = {
    "gpt2": _MODEL | {"ffn_hidden_size": 128, "tie_embeddings": True},
    "llama": _MODEL | {"ffn_hidden_size": 96, "tie_embeddings": False, "normalization": "rms_norm", "activation": "swiglu",
                       "position_embedding": "rotary", "bias": False},
}  # fmt: skip
# Clipping is active at every step (test_parity asserts it). At eps 1e-8 AdamW divides rounding errors by rounding errors
# and serial fp32 drifts by itself; at 1e-5 it doesn't.
OPTIMIZERS = {
    "adamw": {"name": "adamw", "lr": 2e-3, "eps": 1e-5, "weight_decay": 0.1, "clip_grad_norm": 0.25},
    "sgd": {"name": "sgd", "lr": 0.5, "momentum": 0.5, "weight_decay": 0.01, "clip_grad_norm": 0.25},
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One job. `model` holds the changes to the style's model section, as pairs so that a case can be a key."""

    style: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    optimizer: str = "adamw"
    zero_stage: int = 1
    recompute: str = "none"
    dtype: str = "fp32"
    micro: int = 0  # 0: see `micro_batch`
    model: tuple[tuple[str, object], ...] = ()
    train: tuple[tuple[str, object], ...] = ()  # changes to the train section
    data: tuple[tuple[str, object], ...] = ()  # to the data section
    zero: tuple[tuple[str, object], ...] = ()  # keys of deepspeed.zero_optimization, alike
    silent_step: int | None = None  # a step in which no label counts
    label: str = ""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def replicas(self) -> frozenset[str]:
        """The axes along which ranks hold the same: norms over tp, everything over dp, the tied embedding on the first and the
        last stage (pp)."""
        held = {"tp": self.tp > 1, "dp": self.dp > 1, "pp": self.pp > 1 and STYLES[self.style]["tie_embeddings"]}
        return frozenset(axis for axis, there in held.items() if there)

    @property
    def micro_batch(self) -> int:
        """One sample where that is cheap. A tp collective on CPU is all latency, so the wider tp is, the fewer and larger."""
        return self.micro or {1: 1, 2: 2, 4: 4, 8: 8}[self.tp]

    @property
    def name(self) -> str:
        axes = [f"{axis}{size}" for axis, size in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)) if size > 1]
        layout = "x".join(axes) or "one"
        return "-".join(part for part in (self.style, layout, "sp" if self.sp else "", self.label, self.optimizer) if part)

    def config(self) -> dict:
        """The job's JSON."""
        return {
            "model": STYLES[self.style] | dict(self.model),
            "parallel": {
                "tp": self.tp, "pp": self.pp, "dp": self.dp, "sequence_parallel": self.sp, "zero_stage": self.zero_stage,
            },
            "batch": {"micro": self.micro_batch, "global": GLOBAL_BATCH},
            "precision": {"dtype": self.dtype},
            "recompute": {"mode": self.recompute},
            "optimizer": OPTIMIZERS[self.optimizer],
            "schedule": {"warmup_steps": 3, "decay": "linear", "min_lr": 1e-4},
            "tokenizer": {"type": "bytes"},
            "data": {"train": [{"path": "none"}]} | dict(self.data),
            "train": {"dir": "none", "steps": STEPS, "seed": SEED} | dict(self.train),
            "deepspeed": {"zero_optimization": dict(self.zero)},
        }  # fmt: skip

    def serial(self, dtype: str | None = None) -> Case:
        """The case whose reference this one is held to: whatever can't change the mathematics taken away."""
        return Case(style=self.style, optimizer=self.optimizer, model=self.model, train=self.train, data=self.data,
                    dtype=dtype or self.dtype, silent_step=self.silent_step)  # fmt: skip


# tp, pp, dp
LAYOUTS = (
    (1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4),
    (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2),
)  # fmt: skip


def layout_cases() -> Iterator[Case]:
    """Every layout for both styles, with sequence parallelism too where tp > 1; the optimizers alternate."""
    for index, (tp, pp, dp) in enumerate(LAYOUTS):
        for sp in (False, True) if tp > 1 else (False,):
            for style in STYLES:
                sgd = (index + sp + (style == "llama")) % 2
                yield Case(style, tp, pp, dp, sp, optimizer="sgd" if sgd else "adamw")


AXES = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "groups8": {"model": (("num_query_groups", 8),)},
    "groups1": {"model": (("num_query_groups", 1),)},
    "qk_norm": {"model": (("qk_norm", True),)},
    # 200 of 256 columns are the vocabulary; or 120 of 256, so that the last tp rank holds padding only.
    "padding": {"model": (("vocab_size", 200), ("vocab_multiple", 128))},
    "bf16": {"dtype": "bf16"},
    "z_and_smoothing": {"train": (("z_loss", 0.01), ("label_smoothing", 0.1)), "model": (("vocab_size", 200),)},
}


def axis_cases() -> Iterator[Case]:
    """The other axes one at a time on TP2xPP2xDP2, and at PP = 1 on TP2xDP2; styles alternate, sequence parallelism on."""
    for pp, first in ((2, "gpt2"), (1, "llama")):
        styles = [first, "llama" if first == "gpt2" else "gpt2"]
        for index, (label, changes) in enumerate(AXES.items()):
            if pp > 1 and label in ("zero2", "zero3"):
                continue
            case = Case(styles[index % 2], 2, pp, 2, sp=True, label=label, optimizer="sgd" if index % 4 < 2 else "adamw")
            yield replace(case, **changes)


def extra_cases() -> Iterator[Case]:
    """Combinations that a single axis doesn't reach."""
    two_groups = (("num_query_groups", 2),)
    yield Case("llama", 4, 1, 1, True, label="groups2", model=(*two_groups, ("qk_norm", True)))
    yield Case("gpt2", 2, 1, 2, label="zero3", zero_stage=3, optimizer="sgd")
    # Dropout of the scores needs the reference attention; without it `auto` takes the fused one.
    yield Case("llama", 2, 2, 2, True, label="fused", model=(("attention_dropout", 0.0),), recompute="selective")
    # Without dropout of hidden states the second norm of a layer adds the residual itself.
    yield Case("llama", 2, 1, 2, True, label="geglu", model=(("activation", "geglu"), ("dropout", 0.0)), zero_stage=3)
    # GPT-NeoX: both branches read one input, half of a head is rotated, gelu by erf. Mistral's window, Qwen's biases and heads.
    neox = (("tie_embeddings", False), ("position_embedding", "rotary"), ("rotary_fraction", 0.5), ("parallel_residual", True),
            ("activation", "gelu_exact"), ("num_query_groups", 8))
    windowed = (("sliding_window", 12), ("qkv_bias", True), ("head_dim", 16))
    for sizes in ((2, 1, 1, True), (1, 2, 1, False)):
        yield Case("llama", *sizes, label="neox", model=(*neox, ("normalization", "layer_norm"), ("bias", True)))
        yield Case("llama", *sizes, label="windowed", model=windowed, optimizer="sgd")
    yield Case("llama", 2, 1, 1, label="neox-no_dropout", model=(*neox, ("dropout", 0.0), ("attention_dropout", 0.0)))
    yield Case("llama", 4, 1, 1, True, label="windowed-groups2", model=(*windowed, ("num_query_groups", 2), ("mlp_bias", True)))
    yield Case("gpt2", 1, 2, 1, label="silent", silent_step=4, optimizer="sgd")
    yield Case("llama", 2, 1, 1, label="silent", silent_step=4, zero_stage=0)
    yield Case("gpt2", 2, 2, 2, True, label="bf16", dtype="bf16")
    yield Case("gpt2", 2, 1, 2, True, label="bf16-zero2", dtype="bf16", zero_stage=2)
    yield Case("llama", 2, 1, 2, True, label="bf16-zero3", dtype="bf16", zero_stage=3)
    yield Case("llama", 2, 1, 2, label="padded_rank", model=(("vocab_size", 120), ("vocab_multiple", 256)))
    # By default every parameter here is so small that ZeRO 3 keeps it gathered: these are released and gathered again.
    released = (("stage3_param_persistence_threshold", 0),)
    yield Case("gpt2", 2, 1, 2, True, label="zero3-released-full", zero_stage=3, zero=released, recompute="full", optimizer="sgd")
    yield Case("llama", 1, 1, 2, label="zero3-released", zero_stage=3, zero=released)
    # By default one bucket holds all gradients of a backward pass; a matrix of the MLP doesn't fit into this one.
    buckets = (("reduce_bucket_size", 3000),)
    yield Case("llama", 1, 2, 2, label="buckets", zero=buckets, optimizer="sgd")
    yield Case("gpt2", 1, 1, 2, label="buckets-zero2", zero_stage=2, zero=buckets)
    yield Case("llama", 1, 1, 2, label="buckets-zero3", zero_stage=3, zero=(*released, *buckets), optimizer="sgd")
    # Fewer micro-batches than stages: no stage is ever in the steady state of 1F1B.
    yield Case("gpt2", 1, 2, 1, label="accumulation1", micro=8)
    yield Case("llama", 1, 4, 1, label="accumulation2", micro=4, recompute="full", optimizer="sgd")


def document_cases() -> Iterator[Case]:
    """No token sees another document, with positions of the sample or of the document; with and without dropout of the scores,
    which is another backend's. Middle stages, which read no tokens, know the documents too."""
    masked, both = (("document_mask", True),), (("document_mask", True), ("reset_positions", True))
    fused = (("attention_dropout", 0.0),)
    yield Case("gpt2", 2, 2, 2, True, label="documents", data=both, model=fused)
    yield Case("llama", 2, 1, 1, True, label="documents", data=both, model=(*fused, ("num_query_groups", 1)))
    yield Case("llama", 1, 4, 1, label="documents-full", data=both, model=fused, recompute="full", micro=2, optimizer="sgd")
    yield Case("gpt2", 1, 1, 2, label="documents-zero3", data=masked, model=fused, zero_stage=3)
    yield Case("llama", 2, 2, 1, True, label="documents-dropout-selective", data=masked, recompute="selective", micro=2)


CASES = {case.name: case for cases in (layout_cases(), axis_cases(), extra_cases(), document_cases()) for case in cases}
