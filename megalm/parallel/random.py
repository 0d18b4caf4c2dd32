"""Where a step is, and dropout that knows nothing of the layout: each rank's slice of the keyed mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalm.ops.attention import Documents, packed_documents
from megalm.ops.dropout import bias_dropout_add
from megalm.ops.random import DropoutKey
from megalm.parallel.groups import TensorParallel


@dataclass(frozen=True)
class Place:
    """Which forward this is: the seed, the step (from 0) and the global index of each sample (int64 [b], beside the model).

    Where the micro-batch says where documents begin: their bounds, and each token's position in its document (int64 [s, b]).
    """

    seed: int
    step: int | Tensor
    samples: Tensor
    documents: Documents | None = None
    positions: Tensor | None = None

    def traceable(self) -> Place:
        """The same with the step and all documents as tensors, so that compiled code serves every step."""
        documents = None if self.documents is None else self.documents._replace(lengths=None)
        return replace(self, step=torch.tensor(self.step), documents=documents)


class StepContext:
    """Set by the engine before each forward; a layer reads it once and carries the value into its recomputation."""

    def __init__(self, seed: int):
        self.seed = seed
        self.place: Place | None = None

    def set(self, step: int, samples: Tensor, document_starts: Tensor | None = None) -> None:
        """`document_starts`: on the host, as MicroBatch has it. What follows from it is found here, once for all layers."""
        documents = positions = None
        if document_starts is not None:
            documents = packed_documents(document_starts, samples.device)
            place = torch.arange(document_starts.shape[1], device=samples.device)
            positions = (place - documents.first).t().contiguous()  # int64 [s, b]
        self.place = Place(self.seed, step, samples, documents, positions)


def hidden_dropout(x: Tensor, residual: Tensor | None, probability: float, place: Place, layer: int | Tensor, op: int,
                   tp: TensorParallel, backend: str) -> Tensor:
    """residual + dropout(x) of hidden states [s/tp or s, b, h]: a rank draws the mask of its own positions only."""
    length = x.shape[0]
    start, whole = (tp.rank * length, tp.size * length) if tp.shards_sequence else (0, length)
    extents = [(start, start + length, whole), (0, x.shape[2], x.shape[2])]
    key = DropoutKey(place.seed, place.step, layer, op)
    return bias_dropout_add(x, None, residual, key, place.samples, extents, probability, backend=backend)
