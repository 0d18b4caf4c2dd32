"""What tools/bench_ops.py times: operations on shapes as in training, the bytes that they must move, and what is asked of them.

An operation's own table stands in TABLES. One without a table is timed on the large cases of tools/kernel_cases, which are there
to prove it and may do more than the operation.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megalm.tools import kernel_cases
from megalm.tools._ops import registered
from megalm.tools.bench_bytes import BYTES, adam_bytes, all_of_it, causal_bytes, in_place_bytes, loss_bytes, read_once

SPLIT, WHOLE = ("forward", "backward"), ("step",)
SIZES = ("full", "small", "tiny")  # for a GPU, for a CPU, for the kernels through the shim
BF16, FP32 = torch.bfloat16, torch.float32
PAGE = 64


@dataclass(frozen=True)
class Workload:
    """`run(*inputs, backend=name)`, timed forward and backward apart, or both as one `step`.

    inputs: makes new tensors on a device. moved: (inputs, results) -> bytes of each phase, what must be read and written once.
    flops: of each phase, where the matrix rate is the bound. rival: what torch.compile is given, default `run` with `compiled`.
    prepare: (inputs, backend) -> the step, where a call has something to be made before. own: of an operation's own table. duel:
    one of those that torch.compile is raced on where time is short.
    """

    op: str
    name: str
    inputs: Callable[[str], list[Tensor]]
    run: Callable[..., Any]
    phases: tuple[str, ...] = SPLIT
    dtype: torch.dtype = BF16
    moved: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[float, ...]] | None = None
    flops: tuple[float, ...] | None = None
    compiled: str = "reference"
    rival: Callable[..., Any] | None = None
    prepare: Callable[[list[Tensor], str], Callable[[], Any]] | None = None
    own: bool = True
    duel: bool = False

    @property
    def ceiling(self) -> str:
        return "copy" if self.flops is None else "matmul"

    def work(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> dict[str, float]:
        """Bytes, or FLOPs, of each phase."""
        amounts = self.flops or (self.moved or BYTES.get(self.op, all_of_it))(inputs, results)
        return dict(zip(self.phases, amounts, strict=True))


# ---- the tables ------------------------------------------------------------------------------------------------------


def random(device: str, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=device).mul_(scale).to(dtype)


def norms(size: str) -> Iterator[Workload]:
    from megalm.ops.norm import add_norm, norm

    def inputs(device: str, rows: int, width: int, kind: str, residual: bool) -> list[Tensor]:
        vectors = [random(device, width, scale=0.1).add_(1)] + [random(device, width)] * (kind == "layer_norm")
        return [random(device, rows, width) for _ in range(1 + residual)] + vectors

    def run(x: Tensor, *rest: Tensor, kind: str, residual: bool, backend: str):
        weight, bias = rest[residual], rest[residual + 1] if kind == "layer_norm" else None
        if residual:
            return add_norm(x, rest[0], weight, bias, 1e-5, kind=kind, backend=backend)
        return norm(x, weight, bias, 1e-5, kind=kind, backend=backend)

    shapes = {"full": [(32768, 4096), (16384, 8192), (1024, 12288), (2048, 32768), (524288, 128), (4097, 4095)],
              "small": [(1024, 1024)], "tiny": [(5, 64)]}
    for rows, width in shapes[size]:
        for kind in ("rms_norm", "layer_norm"):
            for residual in (False, True) if width in (4096, 8192) else (False,):
                yield Workload("norm", f"norm {kind} {rows}x{width}{' residual' * residual}",
                               partial(inputs, rows=rows, width=width, kind=kind, residual=residual),
                               partial(run, kind=kind, residual=residual), duel=(rows, width) in shapes[size][:3:2])


def activations(size: str) -> Iterator[Workload]:
    from megalm.ops.activation import geglu, gelu, swiglu

    shapes = {"full": [(16384, 14336), (32768, 8192)], "small": [(1024, 704)], "tiny": [(3, 64)]}
    for name, call in (("swiglu", swiglu), ("geglu", geglu), ("gelu", gelu)):
        for rows, width in shapes[size]:
            def inputs(device: str, rows: int = rows, width: int = width, gated: bool = call is not gelu) -> list[Tensor]:
                return [random(device, rows, 2 * width)] if gated else [random(device, rows, width), random(device, width)]

            yield Workload("activation", f"activation {name} {rows}x{width}{' bias' * (name == 'gelu')}", inputs, call,
                           duel=(rows, width) == shapes[size][0])


def rotaries(size: str) -> Iterator[Workload]:
    from megalm.ops.rotary import rotary, rotary_qkv, rotary_tables

    shapes = {"full": [(8192, 2, 32, 128), (8192, 2, 40, 64)], "small": [(512, 2, 4, 64)], "tiny": [(3, 2, 2, 16)]}
    for shape in shapes[size]:
        def inputs(device: str, shape: tuple[int, ...] = shape) -> list[Tensor]:
            return [random(device, *shape), *rotary_tables(shape[0], shape[3], 10000.0, None, device)]

        yield Workload("rotary", f"rotary {'x'.join(map(str, shape))}", inputs, rotary, duel=shape == shapes[size][0])
    s, b, heads, d = shapes[size][0]
    groups = max(1, heads // 4)

    def packed(device: str) -> list[Tensor]:
        return [random(device, s, b, (heads + 2 * groups) * d), *rotary_tables(s, d, 10000.0, None, device)]

    def in_place(qkv: Tensor, cos: Tensor, sin: Tensor, backend: str):
        # Of an alias: what is turned in place is taken from the caller.
        return rotary_qkv(qkv.detach(), heads, groups, cos, sin, backend=backend)

    yield Workload("rotary", f"rotary in place {s}x{b}x{heads}x{d}", packed, in_place, WHOLE, moved=in_place_bytes)


def softmaxes(size: str) -> Iterator[Workload]:
    from megalm.ops.softmax import scaled_masked_softmax

    shapes = {"full": [("causal", (4, 32, 2048, 2048)), ("whole", (1, 16, 4096, 4096)), ("padding", (16, 32, 1024, 1024)),
                       ("whole", (1, 4, 4096, 16384))],
              "small": [("causal", (1, 4, 256, 256))], "tiny": [("causal", (1, 2, 5, 64))]}
    for kind, shape in shapes[size]:
        def inputs(device: str, kind=kind, shape=shape) -> list[Tensor]:
            lengths = torch.arange(shape[0], device=device)[:, None, None, None] % 4 * shape[3] // 8
            padding = [torch.arange(shape[3], device=device) >= lengths] if kind == "padding" else []
            return [random(device, *shape), *padding]

        def run(x: Tensor, mask: Tensor | None = None, kind=kind, *, backend: str) -> Tensor:
            return scaled_masked_softmax(x, 0.125, causal=kind == "causal", mask=mask, backend=backend)

        yield Workload("softmax", f"softmax {kind} {'x'.join(map(str, shape))}", inputs, run,
                       moved=causal_bytes if kind == "causal" else None, duel=kind != "padding")


def losses(size: str) -> Iterator[Workload]:
    from megalm.ops.cross_entropy import chunk_gradient, chunk_loss, chunk_statistics

    def inputs(device: str, rows: int, vocab: int) -> list[Tensor]:
        return [random(device, rows, vocab, scale=2.0), torch.randint(vocab, (rows,), device=device),
                torch.ones(rows, dtype=torch.float64, device=device)]

    def run(logits: Tensor, targets: Tensor, weight: Tensor, backend: str) -> Tensor:
        return chunk_loss(logits, targets, logits.shape[1], weight, backend=backend)

    def shared(logits: Tensor, targets: Tensor, weight: Tensor, backend: str) -> Tensor:
        """As on one of several ranks, but for what they tell each other."""
        vocab = logits.shape[1]
        maximum, sums, _ = chunk_statistics(logits, targets, 0, vocab, backend=backend)
        return chunk_gradient(logits, targets, 0, vocab, maximum.double() + sums.double().log(), weight, backend=backend)

    shapes = {"full": [(8192, 131072), (16384, 32000)], "small": [(256, 8192)], "tiny": [(3, 128)]}
    for index, (rows, vocab) in enumerate(shapes[size]):
        for name, call in (("loss", run), ("shared", shared)):
            yield Workload("cross_entropy", f"cross_entropy {name} {rows}x{vocab}", partial(inputs, rows=rows, vocab=vocab), call,
                           WHOLE, moved=loss_bytes, duel=index == 0)


def linear_losses(size: str) -> Iterator[Workload]:
    """The head and its loss: 6 tokens hidden vocab FLOPs; the logits must never be whole in memory."""
    def inputs(device: str, tokens: int, hidden: int, vocab: int) -> list[Tensor]:
        labels = torch.randint(vocab, (1, tokens), device=device)
        return [random(device, tokens, 1, hidden), random(device, vocab, hidden, scale=0.02), labels]

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
        from megalm.parallel.cross_entropy import linear_cross_entropy
        from megalm.parallel.groups import TensorParallel

        return linear_cross_entropy(hidden, weight, labels, weight.shape[0], TensorParallel(), backend)

    def rival(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden.flatten(0, 1).matmul(weight.t())
        return torch.nn.functional.cross_entropy(logits.float(), labels.t().flatten(), reduction="sum")

    shapes = {"full": [(8192, 4096, 131072)], "small": [(256, 256, 4096)], "tiny": [(4, 32, 128)]}
    for tokens, hidden, vocab in shapes[size]:
        yield Workload("cross_entropy", f"cross_entropy linear {tokens}x{hidden}x{vocab}",
                       partial(inputs, tokens=tokens, hidden=hidden, vocab=vocab), run, WHOLE,
                       flops=(6.0 * tokens * hidden * vocab,), rival=rival, duel=True)


def attentions(size: str) -> Iterator[Workload]:
    """Causal, whole and in eight packed documents: two products forward and five backward, each over half of the scores.

    Gradients are summed in a fixed order, which is what training asks for unless train.deterministic is false.
    """
    from megalm.ops.attention import attention, packed_documents

    ordered = partial(attention, deterministic=True)

    shapes = {"full": [(8192, 2, 32, 8, 128), (2048, 8, 32, 32, 64)], "small": [(256, 2, 4, 4, 64)], "tiny": [(4, 1, 2, 1, 64)]}
    for s, b, heads, groups, d in shapes[size]:
        def inputs(device: str, s=s, b=b, heads=heads, groups=groups, d=d) -> list[Tensor]:
            return [random(device, s, b, h, d) for h in (heads, groups, groups)]

        product = 2.0 * b * heads * s * s * d / 2
        yield Workload("attention", f"attention causal {s}x{b}x{heads}x{d}", inputs, ordered, flops=(2 * product, 5 * product))

        def run(q: Tensor, k: Tensor, v: Tensor, backend: str, starts: Tensor) -> Tensor:
            return ordered(q, k, v, documents=packed_documents(starts, q.device), backend=backend)

        length = -(-s // 8)
        starts = (torch.arange(s, dtype=torch.int32) // length * length).expand(b, s)
        yield Workload("attention", f"attention documents {s}x{b}x{heads}x{d}", inputs, partial(run, starts=starts),
                       flops=(2 * product / 8, 5 * product / 8), own=False)  # a setting off by default ranks nobody


def decodes(size: str) -> Iterator[Workload]:
    """A step of generation: one token of each of b sequences against caches of s tokens, kept as model/cache.py keeps them."""
    from megalm.ops.decode import decode

    def inputs(device: str, b: int, s: int, queries: int, heads: int, groups: int, d: int) -> list[Tensor]:
        return [random(device, queries, b, heads, d), *(random(device, b, groups, s, d).permute(2, 0, 1, 3) for _ in range(2))]

    def pages(device: str, b: int, s: int, queries: int, heads: int, groups: int, d: int) -> list[Tensor]:
        table = torch.randperm(b * s // PAGE, device=device).to(torch.int32).view(b, s // PAGE)
        return [random(device, queries, b, heads, d), *(random(device, b * s // PAGE, PAGE, groups, d) for _ in range(2)), table,
                torch.full((b,), s, dtype=torch.int32, device=device)]

    def paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, backend: str) -> Tensor:
        return decode(q, k, v, lengths, table=table, backend=backend)

    shapes = {"full": [(32, 4096, 1, 32, 8, 128), (1, 65536, 1, 32, 8, 128), (64, 2048, 1, 16, 16, 64),
                       (16, 4096, 4, 32, 8, 128)],
              "small": [(2, 512, 1, 4, 2, 64)], "tiny": [(2, 64, 1, 2, 1, 64)]}
    for index, shape in enumerate(shapes[size]):
        sizes = dict(zip(("b", "s", "queries", "heads", "groups", "d"), shape, strict=True))
        name = f"decode {'x'.join(map(str, shape))}"
        yield Workload("decode", name, partial(inputs, **sizes), decode, WHOLE, moved=read_once)
        if index == 0:
            yield Workload("decode", f"{name} pages of {PAGE}", partial(pages, **sizes), paged, WHOLE, moved=read_once)


def dropouts(size: str) -> Iterator[Workload]:
    from megalm.ops.dropout import bias_dropout_add
    from megalm.ops.random import MLP_OUTPUT, DropoutKey

    shapes = {"full": [(8192, 4, 4096)], "small": [(256, 2, 256)], "tiny": [(3, 2, 64)]}
    for s, b, h in shapes[size]:
        def inputs(device: str, s=s, b=b, h=h) -> list[Tensor]:
            return [random(device, s, b, h), random(device, h), random(device, s, b, h), torch.arange(b, device=device)]

        def run(x: Tensor, bias: Tensor, residual: Tensor, samples: Tensor, backend: str) -> Tensor:
            extents = [(0, x.shape[0], x.shape[0]), (0, x.shape[2], x.shape[2])]
            key = DropoutKey(1, 2, 3, MLP_OUTPUT)
            return bias_dropout_add(x, bias, residual, key, samples, extents, 0.1, backend=backend)

        yield Workload("dropout", f"dropout {s}x{b}x{h} bias residual", inputs, run, duel=True)


def optimizers(size: str) -> Iterator[Workload]:
    """A step of AdamW on fp32 weights, as every rank has them under ZeRO 1: `optimizer.impl`."""
    def inputs(device: str, count: int, edge: int) -> list[Tensor]:
        return [random(device, edge, edge, dtype=FP32) for _ in range(count)]

    def prepare(weights: list[Tensor], backend: str) -> Callable[[], Any]:
        from megalm.engine.fused_adam import fused_adam
        from megalm.optim import build_optimizer

        parameters = [torch.nn.Parameter(weight) for weight in weights]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        asked = SimpleNamespace(name="adamw", impl=backend, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        return build_optimizer(asked, [(str(i), p) for i, p in enumerate(parameters)], {"deepspeed": fused_adam}).step

    count, edge = {"full": (24, 4096), "small": (4, 512), "tiny": (2, 8)}[size]
    yield Workload("optimizer", f"optimizer adamw {count}x{edge}x{edge}", partial(inputs, count=count, edge=edge), None, WHOLE,
                   dtype=FP32, moved=adam_bytes, prepare=prepare)


TABLES: dict[str, tuple[Callable[[str], Iterator[Workload]], ...]] = {
    "norm": (norms,), "cross_entropy": (losses, linear_losses), "activation": (activations,), "rotary": (rotaries,),
    "softmax": (softmaxes,), "dropout": (dropouts,), "attention": (attentions,), "decode": (decodes,), "optimizer": (optimizers,),
}


def from_cases(op: str, size: str) -> Iterator[Workload]:
    """The cases of an operation's module that have a backward pass: the large ones, or the first two small ones."""
    module = next((module for module in kernel_cases.MODULES if module.__name__.rpartition(".")[2] == op), None)
    if module is None or size == "small":
        return
    for case in module.large() if size == "full" else module.small()[:2]:
        if case.grads is None:
            continue

        def inputs(device: str, case=case) -> list[Tensor]:
            return [tensor.to(device, BF16 if tensor.is_floating_point() else tensor.dtype) for tensor in case.inputs()]

        yield Workload(op, case.name, inputs, case.run, own=False)


def workloads(size: str, only: Sequence[str] = ()) -> list[Workload]:
    """Of every operation (or of `only`), the tables first."""
    chosen = [op for op in dict.fromkeys([*TABLES, *operations()]) if op in operations() and (not only or op in only)]
    found = [workload for op in chosen for table in TABLES.get(op, ()) for workload in table(size)]
    return found + [workload for op in chosen if op not in TABLES for workload in from_cases(op, size)]


def operations() -> dict[str, list[str]]:
    """{operation: names of its backends}, the optimizer's included."""
    registry = registered()
    return {op: list(backends) for op, backends in registry.backends.items()} | {"optimizer": registry.table["optimizer"]}


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """At least this fraction of the ceiling, for `megalm`, in each of the phases of workloads whose name fits."""

    names: str
    phases: tuple[str, ...]
    least: float


TARGETS = (
    Target(r"norm \w+ (32768x4096|16384x8192|2048x32768)( residual)?$", SPLIT, 0.90),
    Target(r"norm layer_norm 1024x12288$", ("backward",), 0.55),
    Target(r"softmax (causal|whole|padding) ", SPLIT, 0.90),
    Target(r"rotary 8192x", SPLIT, 0.90),
    Target(r"rotary in place 8192x", WHOLE, 0.90),
    Target(r"activation swiglu (16384|32768)x", SPLIT, 0.90),
    Target(r"cross_entropy (loss|shared) 8192x131072$", WHOLE, 0.85),
    Target(r"cross_entropy linear 8192x4096x131072$", WHOLE, 0.85),
    Target(r"decode (32x4096|1x65536)x1x32x8x128", WHOLE, 0.85),
)
MEMORY_TARGETS = {r"cross_entropy linear 8192x4096x131072$": 131072 * 4096 * 4 + 0.5e9}  # the gradient in fp32, as it is summed
"""The most bytes that a step may take beyond its inputs: the weight's gradient and half a gigabyte."""


def asked(name: str) -> list[Target]:
    return [target for target in TARGETS if re.match(target.names, name)]


def memory_asked(name: str) -> float:
    return next((most for names, most in MEMORY_TARGETS.items() if re.match(names, name)), math.inf)
