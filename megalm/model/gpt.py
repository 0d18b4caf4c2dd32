"""The decoder-only Transformer that spans GPT-2/3 and Llama by config, as the plan's list of layers.

embedding -> position -> layers.0 ... layers.N-1 -> final_norm -> head. Every layer takes and returns one tensor of hidden
states [s/tp or s, b, h]; the first takes tokens [b, s]; the head hands (hidden_states, weight) to the loss, so that the
output projection and the cross entropy can be one operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.config import Config
from megalm.model.attention import SelfAttention
from megalm.model.build import DTYPES, Build, layer_number
from megalm.model.cache import LayerCache
from megalm.model.description import LayerDescription
from megalm.model.mlp import MLP
from megalm.model.norm import Norm
from megalm.ops.random import ATTENTION_OUTPUT, EMBEDDING, MLP_OUTPUT
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import Place, StepContext, hidden_dropout
from megalm.parallel.sharding import Kind, Part, declare, initialise, use
from megalm.plan import Plan

WORD = "embedding.word"


class Position(nn.Module):
    """Adds learned positions (where the model has them) to this rank's positions, then the embedding dropout."""

    def __init__(self, build: Build):
        super().__init__()
        model = build.config.model
        self.build, self.weight = build, None
        self.cache: LayerCache | None = None  # set while generation adds to one
        if model.position_embedding == "learned":
            shape = (model.seq_length, model.hidden_size)
            kind = Kind.PARTIAL if build.tp.shards_sequence else Kind.REPLICATED
            values = nn.Parameter(torch.empty(shape, dtype=build.dtype, device=build.device))
            self.weight = declare(values, kind, [Part("embedding.position.weight", shape)], std=build.std)

    def forward(self, hidden: Tensor) -> Tensor:
        tp, length = self.build.tp, hidden.shape[0]
        if self.weight is not None and self.cache is not None:
            hidden = hidden + self.cache.rows(self.weight)
        elif self.weight is not None:
            first = tp.rank * length if tp.shards_sequence else 0
            mine, positions = slice(first, first + length), self.build.positions(self.build.context.place)
            weight = use(self.weight, tp)
            # [s/tp or s, b, h] + [s/tp or s, 1, h], or [s/tp or s, b, h] where each sample has positions of its own
            hidden = hidden + (weight[mine].unsqueeze(1) if positions is None else F.embedding(positions[mine], weight))
        probability = self.build.config.model.dropout
        if self.training and probability > 0.0:
            place, backend = self.build.context.place, self.build.config.kernels.dropout
            hidden = hidden_dropout(hidden, None, probability, place, 0, EMBEDDING, tp, backend)
        return hidden


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))): the pre-norm order of GPT-2 and Llama; with
    parallel_residual x + dropout(attention(norm(x))) + dropout(mlp(norm'(x))) (Wang and Komatsuzaki, GPT-J-6B, 2021)."""

    def __init__(self, index: int, build: Build):
        super().__init__()
        model = build.config.model
        self.build, self.compiled = build, build.config.train.compile
        self.number = layer_number(index, build)
        partial = build.tp.shards_sequence
        self.attention_norm = Norm(f"layers.{index}.attention.norm", model.hidden_size, build, partial=partial)
        self.attention = SelfAttention(index, build)
        self.mlp_norm = Norm(f"layers.{index}.mlp.norm", model.hidden_size, build, partial=partial)
        self.mlp = MLP(index, build)
        # Layers are alike, so one compilation serves all; recomputation of a whole layer runs the compiled layer again.
        self.call = torch.compile(self.run) if self.compiled else self.run

    def forward(self, hidden: Tensor) -> Tensor:
        # Read once, here: by the time a pipeline recomputes this layer, the engine has moved on to other micro-batches.
        place = self.build.context.place
        if self.compiled and place is not None:
            place = place.traceable()
        if self.build.config.recompute.mode == "full" and torch.is_grad_enabled():
            return checkpoint(self.call, hidden, place, use_reentrant=False, preserve_rng_state=False)
        return self.call(hidden, place)

    def run(self, hidden: Tensor, place: Place | None) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), place)
        if self.build.config.model.parallel_residual:
            return self._both(hidden, attended, place)
        if not self.training or self.build.config.model.dropout == 0.0:
            normed, hidden = self.mlp_norm(attended, residual=hidden)
            return hidden + self.mlp(normed)
        hidden = self._dropped(attended, hidden, place, ATTENTION_OUTPUT)
        return self._dropped(self.mlp(self.mlp_norm(hidden)), hidden, place, MLP_OUTPUT)

    def _both(self, hidden: Tensor, attended: Tensor, place: Place | None) -> Tensor:
        """The layer's output where the MLP doesn't wait for attention."""
        fed = self.mlp(self.mlp_norm(hidden))
        if not self.training or self.build.config.model.dropout == 0.0:
            return hidden + attended + fed
        return self._dropped(fed, self._dropped(attended, hidden, place, ATTENTION_OUTPUT), place, MLP_OUTPUT)

    def _dropped(self, x: Tensor, residual: Tensor, place: Place, op: int) -> Tensor:
        config = self.build.config
        return hidden_dropout(x, residual, config.model.dropout, place, self.number, op, self.build.tp, config.kernels.dropout)


class Head(nn.Module):
    """The untied output embedding [V/tp, h]; the loss does the projection."""

    def __init__(self, vocab: int, build: Build):
        super().__init__()
        hidden = build.config.model.hidden_size
        start, stop = build.tp.share(vocab)
        values = nn.Parameter(torch.empty(stop - start, hidden, dtype=build.dtype, device=build.device))
        self.weight = declare(values, Kind.SHARDED, [Part("head.weight", (vocab, hidden), 0, start, stop)], std=build.std)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.weight


def layers(config: Config, plan: Plan, tp: TensorParallel, context: StepContext,
           device: torch.device | None = None, initial: bool = True) -> list[LayerDescription]:
    """The descriptions of `plan.layers`, in order; parameters are made on `device` in the config's precision.

    `initial`: fill them with their initial values; a caller that overwrites all of them at once saves the time.
    """
    build = Build(config, tp, context, DTYPES[config.precision.dtype], device or torch.device("cpu"))
    vocab, hidden = plan.padded_vocab_size, config.model.hidden_size

    def filled(make):
        return lambda: initialise(make(), config.train.seed) if initial else make()

    embedding = filled(lambda: VocabParallelEmbedding(WORD, vocab, hidden, std=build.std, tp=tp, dtype=build.dtype,
                                                      device=build.device))
    described = [LayerDescription("embedding", embedding, WORD if config.model.tie_embeddings else None),
                 LayerDescription("position", filled(lambda: Position(build)))]
    for index in range(config.model.num_layers):
        described.append(LayerDescription(f"layers.{index}", filled(lambda index=index: TransformerLayer(index, build))))
    final_norm = filled(lambda: Norm("final_norm", hidden, build, partial=tp.shards_sequence))
    described.append(LayerDescription("final_norm", final_norm))
    if config.model.tie_embeddings:
        described.append(LayerDescription("head", embedding, WORD, lambda module, hidden_states: (hidden_states, module.weight)))
    else:
        described.append(LayerDescription("head", filled(lambda: Head(vocab, build))))
    assert tuple(layer.name for layer in described) == plan.layers, plan.layers
    return described
