"""The word embedding, split over the tensor-parallel ranks along the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import leave
from megalm.parallel.groups import TensorParallel
from megalm.parallel.sharding import Kind, Part, declare


class VocabParallelEmbedding(nn.Module):
    """Rows [start, stop) of the full [V, h] table on each rank (Shoeybi et al., 2019, section 3).

    Input: tokens int64 [b, s]. Output [s/tp, b, h] under sequence parallelism, else [s, b, h].
    It holds exactly one parameter, `weight`, so that it can be tied to the head.
    """

    def __init__(self, name: str, vocab: int, hidden: int, *, std: float, tp: TensorParallel, dtype: torch.dtype,
                 device: torch.device):
        super().__init__()
        self.tp = tp
        self.start, self.stop = tp.share(vocab)
        self.weight = declare(nn.Parameter(torch.empty(self.stop - self.start, hidden, dtype=dtype, device=device)), Kind.SHARDED,
                              [Part(f"{name}.weight", (vocab, hidden), 0, self.start, self.stop)], std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t().contiguous()  # [b, s] -> [s, b]
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        rows = F.embedding((tokens - self.start).masked_fill(elsewhere, 0), self.weight)
        return leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp)  # [s, b, h] {tp} -> [s/tp or s, b, h]
