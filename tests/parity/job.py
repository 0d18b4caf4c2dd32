"""What each rank of a parity job runs: config -> plan -> groups -> layers -> engine, ten steps, and everything it saw."""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from pytest import MonkeyPatch
from torch import Tensor

from megalm.engine.engine import Engine, build
from megalm.model import layers
from megalm.parallel.groups import start
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import declared, part_slices
from tests.parity import mutations
from tests.parity.cases import STEPS, Case
from tests.parity.compare import Piece, RankResult
from tests.parity.data import global_batch, micro_batches
from tests.parity.references import EVALUATION_STEP, config_and_plan


def train(rank: int, world_size: int, case: Case, mutation: str | None = None, steps: int = STEPS) -> RankResult:
    """Run a case (with one mechanism taken away, where `mutation` names it) and report this rank's share."""
    torch.manual_seed(rank)  # whatever still draws from torch's generator differs between ranks, and shows
    config, plan = config_and_plan(case)
    packed = config.data.document_mask or config.data.reset_positions
    with MonkeyPatch.context() as patch:
        groups = mutations.apply(mutation, patch, start(plan, torch.device("cpu")))
        context = StepContext(config.train.seed)
        engine = build(config, plan, groups, context, layers(config, plan, groups.tp, context))
        result = RankResult(groups.place)
        for step in range(steps):
            if step in (0, steps - 1):
                engine.on_gradients = partial(_keep_gradients, result, engine, step, step == steps - 1)
            batch = global_batch(step, plan.vocab_size, step == case.silent_step)
            outcome = engine.train_step(step, micro_batches(batch, plan, groups.place, packed))
            engine.on_gradients = None
            result.losses.append(outcome.loss)
            result.norms.append(outcome.grad_norm)
            assert not outcome.skipped
        _keep_parameters(result, engine)
        batches = micro_batches(global_batch(EVALUATION_STEP, plan.vocab_size), plan, groups.place, packed)
        result.evaluation = engine.evaluate(batches)
    return result


def _digest(values: Tensor) -> str:
    return hashlib.blake2b(values.detach().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _piece(part, values: Tensor) -> Piece:
    low, high = (part.start, part.stop) if part.dim is not None else (0, part.full_shape[0])
    return Piece(part.name, part.full_shape, part.dim, low, high, 0, values.detach().reshape(-1))


def _keep_gradients(result: RankResult, engine: Engine, step: int, last: bool, slices) -> None:
    """Digests from every rank; the numbers from one rank of each set of replicas.

    What DeepSpeed gives of a gradient that ZeRO has split is put together anew from the dp ranks' shares, the same bytes on
    each of them: its digest is kept apart for each dp rank. Where a rank itself holds the whole gradient, that is compared.
    """
    place, own = engine.groups.place, _own_gradients(engine)
    for part, gradient in slices:
        piece = _piece(part, gradient.clone())
        key = piece.place if own else (*piece.place, f"dp {place.dp}")
        digest = _digest(own.get(part.name, piece.values))
        result.digests.setdefault(f"gradient of step {step}", {})[key] = digest
        if place.dp == 0 and (part.dim is not None or place.tp == 0):
            result.first_gradients += [piece] if step == 0 else []
            result.last_gradients += [piece] if last else []


def _own_gradients(engine: Engine) -> dict[str, Tensor]:
    """Part name -> the reduced gradient in this rank's own memory; empty where ZeRO has split the gradients."""
    name = {"none": "grad", "BF16_Optimizer": "_hp_grad"}.get(engine.plan.wrapper)
    if name is None:
        return {}
    return {part.name: values for parameter in engine.parameters
            for part, values in part_slices(parameter, getattr(parameter, name))}


def _keep_parameters(result: RankResult, engine: Engine) -> None:
    """Owned masters, as a checkpoint would save them; digests of all masters, and of the weights that compute, which are read
    from each rank's own memory (under ZeRO 3, of those that it keeps gathered)."""
    for fragment in engine.fragments():
        if fragment.role != "master":
            continue
        piece = Piece(fragment.part, fragment.full_shape, fragment.dim, fragment.low, fragment.high, fragment.start,
                      fragment.tensor.detach().clone())  # fmt: skip
        result.digests.setdefault("master", {})[piece.place] = _digest(piece.values)
        if fragment.owned:
            result.parameters.append(piece)
    for parameter in engine.parameters:
        if parameter.numel() == sum(part.numel for part in declared(parameter).parts):
            for part, weight in part_slices(parameter, parameter.detach()):
                piece = _piece(part, weight)
                result.digests.setdefault("weight", {})[piece.place] = _digest(piece.values)
