"""One mechanism taken away, inside a rank, to show that the proof notices.

Each is the bug one would really write: the mechanism's call left out, everything else as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pytest import MonkeyPatch

from megalm.parallel.groups import Groups


def partial_gradients(patch: MonkeyPatch, groups: Groups) -> Groups:
    """Nobody completes the gradients of norms, biases and positions over tp."""
    if groups.plan.pp == 1:
        return replace(groups, tp=replace(groups.tp, complete_in_backward=False))
    from megalm.engine.pipeline import StageEngine

    patch.setattr(StageEngine, "_complete_partial_gradients", lambda self: None)
    return groups


def token_mean(patch: MonkeyPatch, groups: Groups) -> Groups:
    """The mean of the micro-batches' means instead of the mean over the step's tokens."""
    from megalm.engine.loss import TokenLoss, counted

    def mean(self: TokenLoss, outputs, targets):
        labels, scale = targets
        return whole(self, outputs, (labels, scale * 0 + 1 / max(1, counted(labels))))

    whole = TokenLoss.__call__
    patch.setattr(TokenLoss, "__call__", mean)
    return groups


def token_count(patch: MonkeyPatch, groups: Groups) -> Groups:
    """Each dp rank normalises by its own label count."""
    from megalm.engine.engine import Engine, counted, token_scale

    patch.setattr(Engine, "_scale", lambda self, batches: token_scale(
        torch.tensor(sum(counted(batch.labels) for batch in batches if batch.labels is not None)), len(batches)))  # fmt: skip
    return groups


def tied_gradients(patch: MonkeyPatch, groups: Groups) -> Groups:
    """The first and the last stage keep their own gradient of the shared embedding."""
    from deepspeed.runtime.pipe import schedule

    from megalm.engine.pipeline import StageEngine

    patch.setitem(StageEngine._INSTRUCTION_MAP, schedule.ReduceTiedGrads, lambda self: None)
    return groups


def tp_marks(patch: MonkeyPatch, groups: Groups) -> Groups:
    """Sharded parameters without the mark by which DeepSpeed's norm counts them on every tp rank."""
    from megalm.model import gpt

    def without_marks(module, seed):
        for parameter in initialise(module, seed).parameters():
            del parameter.tensor_model_parallel
        return module

    initialise = gpt.initialise
    patch.setattr(gpt, "initialise", without_marks)
    return groups


def dropout_capture(patch: MonkeyPatch, groups: Groups) -> Groups:
    """A layer asks where the step is whenever it runs, so its recomputation asks again."""
    from megalm.model.attention import SelfAttention
    from megalm.model.gpt import TransformerLayer

    run, core = TransformerLayer.run, SelfAttention._core
    patch.setattr(TransformerLayer, "run", lambda self, hidden, place: run(self, hidden, self.build.context.place))
    patch.setattr(SelfAttention, "_core", lambda self, q, k, v, place: core(self, q, k, v, self.build.context.place))
    return groups


def clip_norm(patch: MonkeyPatch, groups: Groups) -> Groups:
    """Each stage and tp rank clips by the norm of what it holds itself."""
    if groups.plan.wrapper == "none":
        from megalm.engine import engine

        whole, alone = engine.global_norm, replace(groups, tp=replace(groups.tp, size=1))
        patch.setattr(engine, "global_norm", lambda parameters, groups: whole(parameters, alone))
    else:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        reduce = DeepSpeedZeroOptimizer._model_parallel_all_reduce
        patch.setattr(DeepSpeedZeroOptimizer, "_model_parallel_all_reduce",
                      lambda self, tensor, op: None if "SUM" in str(op) else reduce(self, tensor, op))  # fmt: skip
    return groups


def clipping(patch: MonkeyPatch, groups: Groups) -> Groups:
    """The norm is reported and nothing is clipped: no gradient shows it, only where the parameters go."""
    from megalm.engine import engine

    if groups.plan.wrapper == "none":
        patch.setattr(engine, "clip", lambda parameters, norm, limit: None)
    else:
        derive = engine.ds_config
        patch.setattr(engine, "ds_config", lambda config, plan: derive(config, plan) | {"gradient_clipping": 0.0})
    return groups


def head_gradient(patch: MonkeyPatch, groups: Groups) -> Groups:
    """The head's weight leaves the last stage as a leaf: DeepSpeed clears its half-precision gradient as it arrives."""
    from megalm.engine.pipeline import StageModule

    patch.delattr(StageModule, "forward")
    return groups


Mutation = Callable[[MonkeyPatch, Groups], Groups]
MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        partial_gradients,
        token_mean,
        token_count,
        tied_gradients,
        tp_marks,
        dropout_capture,
        clip_norm,
        clipping,
        head_gradient,
    )
}


def apply(name: str | None, patch: MonkeyPatch, groups: Groups) -> Groups:
    """Take the named mechanism away; the groups to build with. Nothing is changed where `name` is None."""
    return groups if name is None else MUTATIONS[name](patch, groups)
