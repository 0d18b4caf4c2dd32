"""The feed-forward block: gelu(x W_up) W_down, or f(x W_gate) * (x W_up) W_down (Shazeer, "GLU Variants", 2020)."""

from __future__ import annotations

from torch import Tensor, nn

from megalm.model.build import Build
from megalm.ops.activation import geglu, gelu, gelu_exact, swiglu
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear

ACTIVATIONS = {"gelu": gelu, "gelu_exact": gelu_exact, "swiglu": swiglu, "geglu": geglu}


class MLP(nn.Module):
    """Input and output [s/tp or s, b, h]; inside, f/tp wide. Gate and up are one fused parameter, gate rows first."""

    def __init__(self, index: int, build: Build):
        super().__init__()
        model = build.config.model
        self.activation, self.backend = ACTIVATIONS[model.activation], build.config.kernels.activation
        name, hidden, ffn = f"layers.{index}.mlp", model.hidden_size, model.ffn_hidden_size
        options = dict(bias=model.mlp_bias, std=build.std, tp=build.tp, dtype=build.dtype, device=build.device)
        names = [f"{name}.gate", f"{name}.up"] if model.gated else [f"{name}.up"]
        self.up = ColumnParallelLinear(names, [ffn] * len(names), hidden, **options)
        self.down = RowParallelLinear(f"{name}.down", hidden, ffn, **{**options, "std": build.residual_std})

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)  # [s/tp or s, b, h] -> [s, b, f/tp] or [s, b, 2f/tp]
        return self.down(self.activation(wide, backend=self.backend))  # [s, b, f/tp] -> [s/tp or s, b, h]
