"""The reference's run for a case, computed once in a session and kept."""

from __future__ import annotations

from functools import cache

from megalm.config import Config, validate
from megalm.optim import lr_at
from megalm.plan import Plan, make_plan
from tests.parity import reference
from tests.parity.cases import DTYPES, STEPS, Case
from tests.parity.data import global_batch

EVALUATION_STEP = 1000  # any step that isn't trained on


def config_and_plan(case: Case) -> tuple[Config, Plan]:
    config = validate(case.config() | ({"precision": {"dtype": "fp32"}} if case.dtype == "fp64" else {}))
    return config, make_plan(config, case.world_size)


def shape(case: Case) -> reference.Shape:
    config, plan = config_and_plan(case)
    return reference.Shape.of(config.model, plan.vocab_size, plan.padded_vocab_size)


def record(case: Case, micro_batch: int | None = None, steps: int = STEPS) -> reference.Record:
    """The serial run that has the case's mathematics, in the case's dtype."""
    return _record(case.serial(), micro_batch, steps)


@cache
def _record(case: Case, micro_batch: int | None, steps: int) -> reference.Record:
    config, plan = config_and_plan(case)
    o, size = config.optimizer, plan.vocab_size
    recipe = reference.Recipe(
        seed=config.train.seed, steps=steps, dtype=DTYPES[case.dtype], optimizer=o.name, betas=tuple(o.betas), eps=o.eps,
        lr=lambda step: lr_at(config.schedule, o.lr, STEPS, step), weight_decay=o.weight_decay, momentum=o.momentum,
        clip_grad_norm=o.clip_grad_norm, z_loss=config.train.z_loss, label_smoothing=config.train.label_smoothing,
        micro_batch=micro_batch, document_mask=config.data.document_mask, reset_positions=config.data.reset_positions,
    )  # fmt: skip
    whole = reference.Shape.of(config.model, size, plan.padded_vocab_size)
    evaluation = [global_batch(EVALUATION_STEP, size)]
    return reference.train(whole, recipe, lambda step: global_batch(step, size, step == case.silent_step), evaluation)
