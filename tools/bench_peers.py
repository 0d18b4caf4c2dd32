"""What tools/bench_train.py races: megalm, a plain PyTorch loop, transformers, and a bare DeepSpeed pipeline.

All train the same Llama-style decoder (RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings) with AdamW and
gradient clipping on the same random tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config import validate
from megalm.data.loader import MicroBatch
from megalm.model import layers
from megalm.parallel.groups import start
from megalm.parallel.random import StepContext
from megalm.plan import make_plan
from megalm.tools.bench_ranks import Step

LR, BETAS, WEIGHT_DECAY, CLIP, EPS = 3e-4, (0.9, 0.95), 0.1, 1.0, 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POOL = 16  # batches made beforehand, taken in turn


@dataclass(frozen=True)
class Size:
    """The model and the global batch, in samples of `seq` tokens."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    ffn: int = 704
    seq: int = 256
    vocab: int = 8192
    batch: int = 8

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.seq


@dataclass(frozen=True)
class Spec:
    """One contender. `kind` names its maker in MAKERS; micro: samples a micro-batch (None: all of a rank's at once)."""

    kind: str
    dtype: str = "fp32"
    compile: bool = False
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    micro: int | None = None

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def micro_batch(self, size: Size) -> int:
        return self.micro or size.batch // self.dp

    def __str__(self) -> str:
        degrees = [f"{axis}{n}" for axis, n in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)) if n > 1]
        extra = ["sp"] * self.sp + ["compile"] * self.compile
        return "-".join([self.kind, self.dtype, *degrees, *extra])


def batches(spec: Spec, size: Size, dp_rank: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Each step's micro-batches (tokens [b, s], labels [b, s]) of one data-parallel rank, for ever."""
    random = torch.Generator().manual_seed(1)
    pool = torch.randint(size.vocab, (POOL, size.batch, size.seq + 1), generator=random)
    micro = spec.micro_batch(size)
    for step in count():
        groups = pool[step % POOL].split(micro)[dp_rank::spec.dp]  # [b, s + 1] each
        yield [(group[:, :-1].contiguous(), group[:, 1:].contiguous()) for group in groups]


# ---- megalm ----------------------------------------------------------------------------------------------------------


def megalm_config(spec: Spec, size: Size) -> dict[str, Any]:
    """The run as a user would write it."""
    stages = [size.layers // spec.pp] * spec.pp
    return {
        "model": {
            "num_layers": size.layers, "hidden_size": size.hidden, "num_attention_heads": size.heads, "seq_length": size.seq,
            "ffn_hidden_size": size.ffn, "vocab_size": size.vocab, "normalization": "rms_norm", "activation": "swiglu",
            "position_embedding": "rotary", "bias": False, "tie_embeddings": False,
        },
        "parallel": {
            "tp": spec.tp, "pp": spec.pp, "dp": spec.dp, "sequence_parallel": spec.sp, "stages": stages,
            "zero_stage": 0 if spec.world == 1 else 1,
        },
        "batch": {"micro": spec.micro_batch(size), "global": size.batch},
        "precision": {"dtype": spec.dtype},
        "optimizer": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, "clip_grad_norm": CLIP},
        "schedule": {"decay": "constant"},
        "tokenizer": {"type": "bytes"},
        "data": {"train": [{"path": "unused"}]},
        "train": {"dir": "unused", "steps": 1 << 30, "compile": spec.compile},
    }  # fmt: skip


def make_megalm(spec: Spec, size: Size, rank: int) -> tuple[Step, dict[str, Any]]:
    from megalm.engine.engine import build

    config = validate(megalm_config(spec, size))
    plan = make_plan(config, spec.world)
    groups = start(plan, torch.device("cpu"))
    context = StepContext(config.train.seed)
    engine = build(config, plan, groups, context, layers(config, plan, groups.tp, context, groups.device))
    steps, samples = enumerate(batches(spec, size, groups.place.dp)), torch.arange(spec.micro_batch(size))

    def step() -> float:
        index, pieces = next(steps)
        return engine.train_step(index, [MicroBatch(samples, tokens, labels) for tokens, labels in pieces]).loss

    return step, {"parameters": sum(p.numel() for p in engine.parameters), "wrapper": plan.wrapper}


# ---- a plain PyTorch loop --------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Block(nn.Module):
    """A decoder layer as one would write it by hand: [b, s, h] -> [b, s, h]."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads, h = size.heads, size.hidden
        self.norm1, self.norm2 = RMSNorm(h), RMSNorm(h)
        self.qkv, self.projection = nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
        self.gate_up, self.down = nn.Linear(h, 2 * size.ffn, bias=False), nn.Linear(size.ffn, h, bias=False)
        half = h // size.heads // 2
        angles = torch.outer(torch.arange(size.seq), 10000.0 ** (-torch.arange(half) / half))  # [s, d/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)  # [b, H, s, d/2]
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [b, s, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [b, H, s, d] each
        context = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.projection(context.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Embedding(nn.Embedding):
    pass


class Head(nn.Linear):
    """[b, s, h] -> logits [b, s, V]."""


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def plain_layers(size: Size) -> list[tuple[type[nn.Module], tuple]]:
    """(class, arguments) of each layer in order."""
    return [(Embedding, (size.vocab, size.hidden)), *[(Block, (size,))] * size.layers, (RMSNorm, (size.hidden,)),
            (Head, (size.hidden, size.vocab, False))]


def initialise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def adamw(parameters: Iterator[Tensor]) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors don't."""
    parameters = list(parameters)
    return torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
                             lr=LR, betas=BETAS, eps=EPS, fused=True)  # fmt: skip


def loop(spec: Spec, size: Size, model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> tuple[Step, dict]:
    """A hand-written training loop of a model that computes its loss; in bf16 it steps fp32 masters and copies them back."""
    model = initialise(model).to(DTYPES[spec.dtype])
    weights, data = list(model.parameters()), batches(spec, size, 0)
    masters = weights if spec.dtype == "fp32" else [nn.Parameter(p.detach().float()) for p in weights]
    optimizer = adamw(masters)
    run = torch.compile(model) if spec.compile else model

    def step() -> float:
        ((tokens, labels),) = next(data)
        loss = loss_of(run, tokens, labels)
        loss.backward()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return loss.item()

    return step, {"parameters": sum(p.numel() for p in weights)}


class Plain(nn.Sequential):
    """The layers and the loss in one module, so that torch.compile sees all of it: tokens, labels [b, s] -> mean loss."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return token_loss(super().forward(tokens), labels)


def make_plain(spec: Spec, size: Size, rank: int) -> tuple[Step, dict[str, Any]]:
    model = Plain(*[layer(*arguments) for layer, arguments in plain_layers(size)])
    return loop(spec, size, model, lambda run, tokens, labels: run(tokens, labels))


def make_transformers(spec: Spec, size: Size, rank: int) -> tuple[Step, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.ffn, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, max_position_embeddings=size.seq, rms_norm_eps=1e-5, tie_word_embeddings=False,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    # `shift_labels` are labels that are already one token ahead, as ours are.
    return loop(spec, size, LlamaForCausalLM(config).train(),
                lambda run, tokens, labels: run(input_ids=tokens, labels=labels, shift_labels=labels).loss)


# ---- a bare DeepSpeed pipeline ---------------------------------------------------------------------------------------


def make_deepspeed(spec: Spec, size: Size, rank: int) -> tuple[Step, dict[str, Any]]:
    """DeepSpeed's own PipelineModule of the plain layers: PP, DP or both, ZeRO 1, split by blocks."""
    from megalm.engine.grid import adopt_process_group
    from megalm.engine.pipeline import (
        DeepSpeedConfig,
        LayerSpec,
        PipelineEngine,
        PipelineModule,
        PipeModelDataParallelTopology,
    )

    adopt_process_group()
    micro = spec.micro_batch(size)
    config = {
        "train_batch_size": size.batch, "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": size.batch // (micro * spec.dp), "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 60,
    }  # fmt: skip
    if spec.dtype == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    topology = PipeModelDataParallelTopology(num_pp=spec.pp, num_mp=1, num_dp=spec.dp)
    torch.manual_seed(1)
    model = initialise(PipelineModule([LayerSpec(layer, *arguments) for layer, arguments in plain_layers(size)],
                                      topology=topology, loss_fn=token_loss, partition_method="type:Block"))
    engine = PipelineEngine(args=None, model=model, optimizer=adamw(model.parameters()), mpu=model.mpu(), config=config,
                            config_class=DeepSpeedConfig(config, model.mpu()))
    data = batches(spec, size, topology.get_coord(rank).data)
    return (lambda: float(engine.train_batch(iter(next(data)))),
            {"parameters": sum(p.numel() for p in model.parameters()), "wrapper": type(engine.optimizer).__name__})


MAKERS = {"megalm": make_megalm, "plain": make_plain, "transformers": make_transformers, "deepspeed": make_deepspeed}


def make(spec: Spec, size: Size, rank: int) -> tuple[Step, dict[str, Any]]:
    """(step, facts about the contender) of one rank, which has joined its contender's process group."""
    return MAKERS[spec.kind](spec, size, rank)
