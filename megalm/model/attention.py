"""Self-attention over the heads of one tensor-parallel rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.model.build import Build, layer_number
from megalm.model.cache import LayerCache
from megalm.model.norm import Norm
from megalm.ops.attention import attention
from megalm.ops.random import ATTENTION_SCORES, DropoutKey
from megalm.ops.rotary import rotary, rotary_qkv
from megalm.parallel.collectives import enter
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.random import Place
from megalm.parallel.sharding import Kind, Part, declare, use


class SharedKeyValue(nn.Module):
    """Key and value projections when there are fewer query groups than tp ranks: whole on every rank, which uses one group.

    A rank's gradient covers its own group only, so it is a term of the sum over tp.
    """

    def __init__(self, name: str, build: Build):
        super().__init__()
        model = build.config.model
        self.tp, self.size, groups = build.tp, model.head_dim, model.num_query_groups
        self.group = build.tp.rank * groups // build.tp.size

        def part(which: str, shape: tuple[int, ...], std: float | None) -> nn.Parameter:
            values = nn.Parameter(torch.empty(shape, dtype=build.dtype, device=build.device))
            return declare(values, Kind.PARTIAL, [Part(f"{name}.{which}", shape)], std=std)

        rows, columns = groups * self.size, model.hidden_size
        self.key_weight, self.value_weight = (part(f"{w}.weight", (rows, columns), build.std) for w in ("key", "value"))
        self.key_bias = self.value_bias = None
        if model.qkv_bias:
            self.key_bias, self.value_bias = (part(f"{w}.bias", (rows,), None) for w in ("key", "value"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h], already gathered and marked by f -> key and value [s, b, d] of this rank's group."""
        mine = slice(self.group * self.size, (self.group + 1) * self.size)

        def project(weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, use(weight, self.tp)[mine], None if bias is None else use(bias, self.tp)[mine])

        return project(self.key_weight, self.key_bias), project(self.value_weight, self.value_bias)


class SelfAttention(nn.Module):
    """Input and output [s/tp or s, b, h]; inside, H/tp heads and G/tp query groups (one group where G < tp)."""

    def __init__(self, index: int, build: Build):
        super().__init__()
        model, tp = build.config.model, build.tp
        self.number, self.build, self.tp = layer_number(index, build), build, tp
        self.heads = model.num_attention_heads // tp.size
        self.groups = max(1, model.num_query_groups // tp.size)
        name, size, hidden = f"layers.{index}.attention", model.head_dim, model.hidden_size
        query, key_value = model.num_attention_heads * size, model.num_query_groups * size
        options = dict(bias=model.qkv_bias, std=build.std, tp=tp, dtype=build.dtype, device=build.device)
        if model.num_query_groups >= tp.size:
            names = [f"{name}.{part}" for part in ("query", "key", "value")]
            self.qkv, self.shared = ColumnParallelLinear(names, [query, key_value, key_value], hidden, **options), None
        else:
            self.qkv = ColumnParallelLinear([f"{name}.query"], [query], hidden, **options)
            self.shared = SharedKeyValue(name, build)
        self.query_norm = Norm(f"{name}.query_norm", size, build, partial=True) if model.qk_norm else None
        self.key_norm = Norm(f"{name}.key_norm", size, build, partial=True) if model.qk_norm else None
        self.projection = RowParallelLinear(f"{name}.projection", hidden, query,
                                            **{**options, "bias": model.bias, "std": build.residual_std})
        self.window = None if model.sliding_window is None else (model.sliding_window - 1, 0)
        self.tables = build.rotary_tables if model.position_embedding == "rotary" else None
        self.recomputes = build.recomputes_scores
        self.core = torch.compiler.disable(self._core) if build.leaves_compiled_code else self._core
        self.cache: LayerCache | None = None  # set while generation adds to one

    def forward(self, x: Tensor, place: Place | None) -> Tensor:
        query, key, value = self._project(x, place)  # [s/tp or s, b, h] -> [s, b, H/tp or G/tp, d]
        if self.cache is not None:
            kernels = self.build.config.kernels
            context = self.cache.attend(query, key, value, self.window, kernels.attention, kernels.softmax)
        elif self.recomputes and torch.is_grad_enabled():
            context = checkpoint(self.core, query, key, value, place, use_reentrant=False, preserve_rng_state=False)
        else:
            context = self.core(query, key, value, place)
        return self.projection(context.flatten(2))  # [s, b, h/tp] -> [s/tp or s, b, h]

    def _project(self, x: Tensor, place: Place | None) -> tuple[Tensor, Tensor, Tensor]:
        size = self.build.config.model.head_dim
        options = {"positions": self.build.positions(place)} if self.cache is None else self.cache.places()
        options["backend"] = self.build.config.kernels.rotary
        if self.shared is None:
            qkv = self.qkv(x)  # -> [s, b, (H + 2G) d/tp]
            if self.tables is not None and self.query_norm is None:
                return rotary_qkv(qkv, self.heads, self.groups, *self.tables, **options)
            query, key, value = qkv.split([self.heads * size, self.groups * size, self.groups * size], dim=-1)
        else:
            # One f for both: the input gradients of this rank's query and of its key and value are summed before it.
            whole = enter(x, self.tp)
            query = self.qkv(whole, entered=True)
            key, value = self.shared(whole)
        query, key, value = (part.unflatten(-1, (-1, size)) for part in (query, key, value))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.tables is not None:
            query, key = (rotary(part, *self.tables, **options) for part in (query, key))
        return query, key, value

    def _core(self, query: Tensor, key: Tensor, value: Tensor, place: Place | None) -> Tensor:
        """softmax(q k^T / sqrt d) v, within documents where data.document_mask says so: [s, b, H/tp, d] -> [s, b, H/tp, d]."""
        config = self.build.config
        dropout = config.model.attention_dropout if self.training else 0.0
        keyed = dropout > 0.0
        assert not keyed or place is not None, "dropout without a step context"
        return attention(
            query, key, value, causal=True, window=self.window, documents=self.build.documents(place), dropout=dropout,
            backend=config.kernels.attention, softmax=config.kernels.softmax, deterministic=config.train.deterministic,
            fp8=config.train.attention_fp8 and self.training,
            key=DropoutKey(place.seed, place.step, self.number, ATTENTION_SCORES) if keyed else None,
            samples=place.samples if keyed else None,
            heads=(*self.tp.share(config.model.num_attention_heads), config.model.num_attention_heads))
