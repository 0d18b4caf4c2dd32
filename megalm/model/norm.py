"""LayerNorm and RMSNorm as layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.model.build import Build
from megalm.ops.norm import add_norm, norm
from megalm.parallel.sharding import Kind, Part, declare, use


class Norm(nn.Module):
    """Normalisation over the last dim with gamma (and beta for layer_norm), each [size], whole on every tp rank.

    Args:
        partial: a rank sees only some of the rows (positions under sequence parallelism, heads for a QK norm), so that
            its gradient is a term of the sum over tp.
    """

    def __init__(self, name: str, size: int, build: Build, *, partial: bool):
        super().__init__()
        model = build.config.model
        self.tp, self.kind, self.eps, self.backend = build.tp, model.normalization, model.norm_eps, build.config.kernels.norm
        kind = Kind.PARTIAL if partial and build.tp.size > 1 else Kind.REPLICATED

        def vector(suffix: str, fill: float) -> nn.Parameter:
            values = nn.Parameter(torch.empty(size, dtype=build.dtype, device=build.device))
            return declare(values, kind, [Part(f"{name}.{suffix}", (size,))], fill=fill)

        self.weight = vector("weight", 1.0)
        self.bias = vector("bias", 0.0) if self.kind == "layer_norm" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual (the norm of their sum, the sum), one pass over memory where the backend fuses them."""
        weight, bias = use(self.weight, self.tp), None if self.bias is None else use(self.bias, self.tp)
        if residual is None:
            return norm(x, weight, bias, self.eps, kind=self.kind, backend=self.backend)
        return add_norm(x, residual, weight, bias, self.eps, kind=self.kind, backend=self.backend)
