"""The other side of the parity proof: a GPT in plain PyTorch and a plain training loop.

Nothing here comes from megalm's model, parallel layers or engine. Weights are a dict from canonical part name to the
full tensor, the forward is a function of that dict, every matrix is whole, and there is one process. Only three things
are shared, because they are definitions and not computations: the names of the parts, the keyed normal numbers a part
starts from, and the keyed dropout masks (megalm.ops.random; its own tests hold it to the published Philox vectors).

Shapes: b samples, s positions, h hidden, H heads, G query groups, d head width, f ffn width, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.random import DropoutKey, keep_mask, normal

EMBEDDING, ATTENTION_SCORES, ATTENTION_OUTPUT, MLP_OUTPUT = range(4)
IGNORED = -100

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the forward needs to know of a model; `of` reads it from a megalm Config's model section."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    seq_length: int
    vocab_size: int
    padded_vocab_size: int
    normalization: str = "layer_norm"
    activation: str = "gelu"
    position_embedding: str = "learned"
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    bias: bool = True
    qkv_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    parallel_residual: bool = False
    sliding_window: int | None = None
    head_dim: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    rotary_theta: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_scaling: dict | None = None
    init_std: float = 0.02

    @classmethod
    def of(cls, model, vocab_size: int, padded_vocab_size: int) -> Shape:
        """The shape that a validated `config.model` describes."""
        given = model.model_dump(mode="json")
        sizes = {"vocab_size": vocab_size, "padded_vocab_size": padded_vocab_size}
        return cls(**{name: given[name] for name in cls.__dataclass_fields__ if name not in sizes}, **sizes)


def part_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every canonical part of the model and its full shape."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    H, G, V = shape.num_attention_heads, shape.num_query_groups, shape.padded_vocab_size
    parts: dict[str, tuple[int, ...]] = {"embedding.word.weight": (V, h)}

    def norm(name: str, width: int) -> None:
        parts[f"{name}.weight"] = (width,)
        if shape.normalization == "layer_norm":
            parts[f"{name}.bias"] = (width,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        parts[f"{name}.weight"] = (rows, columns)
        if bias:
            parts[f"{name}.bias"] = (rows,)

    if shape.position_embedding == "learned":
        parts["embedding.position.weight"] = (shape.seq_length, h)
    for i in range(shape.num_layers):
        norm(f"layers.{i}.attention.norm", h)
        for name, rows in (("query", H * d), ("key", G * d), ("value", G * d)):
            linear(f"layers.{i}.attention.{name}", rows, h, shape.qkv_bias)
        if shape.qk_norm:
            norm(f"layers.{i}.attention.query_norm", d)
            norm(f"layers.{i}.attention.key_norm", d)
        linear(f"layers.{i}.attention.projection", h, H * d, shape.bias)
        norm(f"layers.{i}.mlp.norm", h)
        if shape.activation in ("swiglu", "geglu"):
            linear(f"layers.{i}.mlp.gate", f, h, shape.mlp_bias)
        linear(f"layers.{i}.mlp.up", f, h, shape.mlp_bias)
        linear(f"layers.{i}.mlp.down", h, f, shape.mlp_bias)
    norm("final_norm", h)
    if not shape.tie_embeddings:
        parts["head.weight"] = (V, h)
    return parts


def initial_weights(shape: Shape, seed: int) -> Weights:
    """fp32 starting weights: N(0, init_std), the two matrices that write to the residual stream over sqrt(2 layers)."""
    weights = {}
    for name, size in part_shapes(shape).items():
        if len(size) == 1:
            weights[name] = torch.full(size, 1.0 if name.endswith("norm.weight") else 0.0)
            continue
        std = shape.init_std
        if name.endswith(("attention.projection.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * shape.num_layers)
        weights[name] = normal(seed, name, size, None, 0, size[0], std)
    return weights


# ---- forward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropout:
    """Where the step is, for the keyed masks; None in its place means no dropout (evaluation)."""

    seed: int
    step: int
    samples: Tensor  # int64 [b]

    def __call__(self, x: Tensor, layer: int, op: int, probability: float) -> Tensor:
        """x [b, ...] with elements dropped and the rest scaled by 1 / (1 - probability)."""
        if probability == 0.0:
            return x
        extents = [(0, size, size) for size in x.shape[1:]]
        keep = keep_mask(DropoutKey(self.seed, self.step, layer, op), self.samples, extents, probability, x.device)
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype)) / (1.0 - probability)


@dataclass(frozen=True)
class Packing:
    """The documents of packed samples: each token's document int64 [b, s], and what follows from it."""

    documents: Tensor
    mask: bool  # no token sees another document
    reset: bool  # positions count within the document

    def unseen(self) -> Tensor:
        """Which keys a query must not see, bool [b, 1, s, s]."""
        b, s = self.documents.shape
        future = torch.ones(s, s, dtype=torch.bool).triu(1).expand(b, 1, s, s)
        return future | (self.documents[:, None, :, None] != self.documents[:, None, None, :]) if self.mask else future

    def positions(self) -> Tensor:
        """int64 [b, s]"""
        if not self.reset:
            return torch.arange(self.documents.shape[1]).expand_as(self.documents)
        return torch.tensor([[row[:i].count(row[i]) for i in range(len(row))] for row in self.documents.tolist()])

    @classmethod
    def none(cls, tokens: Tensor) -> Packing:
        return cls(torch.zeros_like(tokens), False, False)


def _norm(w: Weights, name: str, x: Tensor, shape: Shape) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    if shape.normalization == "layer_norm":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + shape.norm_eps)
    wide = wide * w[f"{name}.weight"].to(wide.dtype)
    if shape.normalization == "layer_norm":
        wide = wide + w[f"{name}.bias"].to(wide.dtype)
    return wide.to(x.dtype)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rotary_angles(shape: Shape, length: int) -> Tensor:
    """Angles [s, r/2] of the r rotated elements of a head in fp64: position x frequency, the latter changed by
    rotary_scaling (linear, or Llama 3.1's)."""
    d, scaling = int(shape.head_dim * shape.rotary_fraction), shape.rotary_scaling
    frequency = shape.rotary_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if scaling and scaling["type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling:
        turns = scaling["original_seq_length"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = share * frequency + (1 - share) * frequency / scaling["factor"]
    return torch.outer(torch.arange(length, dtype=torch.float64), frequency)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Half-split rotation of the first r elements of x [b, s, heads, d] by angles [b, s, r/2]: pairs are (i, i + r/2)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(wide).unsqueeze(2), angles.sin().to(wide).unsqueeze(2)  # [b, s, 1, r/2]
    turned = 2 * angles.shape[-1]
    left, right = x[..., :turned].to(wide).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, x[..., turned:].to(wide)), dim=-1).to(x.dtype)


def _attention(w: Weights, i: int, x: Tensor, shape: Shape, dropout: Dropout | None, packing: Packing) -> Tensor:
    b, s, _ = x.shape
    H, G, d, name = shape.num_attention_heads, shape.num_query_groups, shape.head_dim, f"layers.{i}.attention"
    q = _linear(w, f"{name}.query", x).view(b, s, H, d)
    k = _linear(w, f"{name}.key", x).view(b, s, G, d)
    v = _linear(w, f"{name}.value", x).view(b, s, G, d)
    if shape.qk_norm:
        q, k = _norm(w, f"{name}.query_norm", q, shape), _norm(w, f"{name}.key_norm", k, shape)
    if shape.position_embedding == "rotary":
        angles = rotary_angles(shape, s)[packing.positions()]
        q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = (t.repeat_interleave(H // G, dim=2) for t in (k, v))  # [b, s, G, d] -> [b, s, H, d]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)  # [b, H, s, s]
    unseen = packing.unseen()
    if shape.sliding_window is not None:
        unseen = unseen | torch.ones(s, s, dtype=torch.bool).tril(-shape.sliding_window)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights = wide.masked_fill(unseen, -math.inf).softmax(-1).to(x.dtype)
    if dropout is not None:
        weights = dropout(weights, i, ATTENTION_SCORES, shape.attention_dropout)
    context = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, H * d)
    return _linear(w, f"{name}.projection", context)  # [b, s, h]


def _mlp(w: Weights, i: int, x: Tensor, shape: Shape) -> Tensor:
    up = _linear(w, f"layers.{i}.mlp.up", x)  # [b, s, f]
    if shape.activation == "swiglu":
        inner = F.silu(_linear(w, f"layers.{i}.mlp.gate", x)) * up
    elif shape.activation == "geglu":
        inner = F.gelu(_linear(w, f"layers.{i}.mlp.gate", x), approximate="tanh") * up
    else:
        inner = F.gelu(up, approximate="none" if shape.activation == "gelu_exact" else "tanh")
    return _linear(w, f"layers.{i}.mlp.down", inner)


def logits(w: Weights, tokens: Tensor, shape: Shape, dropout: Dropout | None = None, packing: Packing | None = None) -> Tensor:
    """Logits [b, s, vocab_size] of tokens [b, s]; the padded columns are cut off."""
    packing = packing or Packing.none(tokens)
    x = w["embedding.word.weight"][tokens]  # [b, s, h]
    if shape.position_embedding == "learned":
        x = x + w["embedding.position.weight"][packing.positions()]

    def drop(x: Tensor, layer: int, op: int) -> Tensor:
        return x if dropout is None else dropout(x, layer, op, shape.dropout)

    x = drop(x, 0, EMBEDDING)
    for i in range(shape.num_layers):
        attended = _attention(w, i, _norm(w, f"layers.{i}.attention.norm", x, shape), shape, dropout, packing)
        after = x + drop(attended, i, ATTENTION_OUTPUT)
        before_mlp = x if shape.parallel_residual else after
        x = after + drop(_mlp(w, i, _norm(w, f"layers.{i}.mlp.norm", before_mlp, shape), shape), i, MLP_OUTPUT)
    x = _norm(w, "final_norm", x, shape)
    head = w["embedding.word.weight" if shape.tie_embeddings else "head.weight"]
    return F.linear(x, head[: shape.vocab_size])


def loss_sum(w: Weights, tokens: Tensor, labels: Tensor, shape: Shape, dropout: Dropout | None = None, z_loss: float = 0.0,
             label_smoothing: float = 0.0, packing: Packing | None = None) -> Tensor:
    """Sum of the cross entropies, with smoothed labels, and z-losses of all labels that count, in at least fp32."""
    scores = logits(w, tokens, shape, dropout, packing).flatten(0, 1)
    scores, labels = scores if scores.dtype == torch.float64 else scores.float(), labels.flatten()
    loss = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return loss + z_loss * scores[labels != IGNORED].logsumexp(-1).square().sum()


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the reference trains. dtype bf16 keeps fp32 masters and accumulates gradients in fp32."""

    seed: int
    steps: int
    optimizer: str = "adamw"
    lr: float | Callable[[int], float] = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    momentum: float = 0.0
    clip_grad_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    micro_batch: int | None = None  # None: the whole global batch in one forward
    document_mask: bool = False
    reset_positions: bool = False

    def packing(self, documents: Tensor) -> Packing:
        return Packing(documents, self.document_mask, self.reset_positions)


@dataclass
class Record:
    """What a run did, reference and megalm alike: compare.py holds one against the other."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first_gradients: Weights = field(default_factory=dict)  # before clipping, full, by canonical name
    last_gradients: Weights = field(default_factory=dict)
    parameters: Weights = field(default_factory=dict)  # after the last step; the fp32 masters where there are some
    evaluation: tuple[float, int] | None = None  # (loss sum, tokens) after the last step


def _make_optimizer(masters: Weights, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in masters.values() if p.dim() >= 2]
    vectors = [p for p in masters.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=1.0, betas=recipe.betas, eps=recipe.eps)


def _gradients(masters: Weights, batch, shape: Shape, recipe: Recipe, step: int) -> tuple[float, Weights]:
    """Loss and accumulated gradients of one global batch: (samples [B], tokens [B, s], labels [B, s])."""
    wide = torch.float64 if recipe.dtype == torch.float64 else torch.float32
    count = max(1, int((batch.labels != IGNORED).sum()))
    live = {name: p.detach().to(recipe.dtype).requires_grad_() for name, p in masters.items()}
    sums = {name: torch.zeros(p.shape, dtype=wide) for name, p in masters.items()}
    total, micro = 0.0, recipe.micro_batch or len(batch.samples)
    for start in range(0, len(batch.samples), micro):
        part = slice(start, start + micro)
        dropout = Dropout(recipe.seed, step, batch.samples[part])
        loss = loss_sum(live, batch.tokens[part], batch.labels[part], shape, dropout, recipe.z_loss, recipe.label_smoothing,
                        recipe.packing(batch.documents[part]))
        loss = loss / count
        for name, gradient in zip(live, torch.autograd.grad(loss, list(live.values())), strict=True):
            sums[name] += gradient
        total += loss.item()
    return total, sums


def train(shape: Shape, recipe: Recipe, batch_of: Callable[[int], object], evaluate_on: Sequence = ()) -> Record:
    """Train from scratch; `batch_of(step)` is the global batch with samples [B], tokens [B, s] and labels [B, s]."""
    wide = torch.float64 if recipe.dtype == torch.float64 else torch.float32
    masters = {k: v.to(recipe.dtype).to(wide) for k, v in initial_weights(shape, recipe.seed).items()}
    optimizer, record = _make_optimizer(masters, recipe), Record()
    for step in range(recipe.steps):
        loss, gradients = _gradients(masters, batch_of(step), shape, recipe, step)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        record.losses.append(loss)
        record.norms.append(norm)
        if step == 0:
            record.first_gradients = {name: g.clone() for name, g in gradients.items()}
        record.last_gradients = {name: g.clone() for name, g in gradients.items()}
        scale = min(1.0, recipe.clip_grad_norm / (norm + 1e-6)) if recipe.clip_grad_norm else 1.0
        for name, p in masters.items():
            p.grad = gradients[name] * scale
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step) if callable(recipe.lr) else recipe.lr
        optimizer.step()
    record.parameters = masters
    if evaluate_on:
        live = {name: p.to(recipe.dtype) for name, p in masters.items()}
        with torch.no_grad():
            sums = [loss_sum(live, batch.tokens, batch.labels, shape, packing=recipe.packing(batch.documents)).item()
                    for batch in evaluate_on]
        record.evaluation = sum(sums), sum(int((batch.labels != IGNORED).sum()) for batch in evaluate_on)
    return record
