"""What a user names as weights from elsewhere: hf:PATH, megatron:PATH, neox:PATH."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megalm.checkpoint.foreign.megatron import open_megatron
from megalm.checkpoint.foreign.neox import open_neox
from megalm.checkpoint.foreign.weights import Foreign
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.fragment import WEIGHT_ROLES, Fragment
from megalm.checkpoint.huggingface import differences, open_huggingface
from megalm.checkpoint.load import PROBLEMS_SHOWN
from megalm.checkpoint.save import Engine, Ranks
from megalm.config.schema import Model

OPENERS = {"megatron": open_megatron, "neox": open_neox}
"""Formats that don't describe their model: what reads them must be told, and finds out whether it is so."""
KINDS = ("hf", *OPENERS)


def kind_of(spec: str) -> tuple[str | None, str]:
    """("hf", PATH) of "hf:PATH"; (None, spec) of anything else, which is a folder of megalm's."""
    kind, colon, path = spec.partition(":")
    return (kind, path) if colon and kind in KINDS else (None, spec)


def open_for(spec: str, model: Model, vocab_size: int) -> Foreign:
    """The weights for a run with this model section and vocabulary.

    Raises CheckpointError with every difference between the two models, in one message.
    """
    kind, path = kind_of(spec)
    if kind in OPENERS:
        return OPENERS[kind](path, model.model_copy(update={"vocab_size": vocab_size}))
    found = open_huggingface(path)
    problems = differences(model, found.model, ("here", f"in {path}"))
    if found.model.vocab_size != vocab_size:
        problems.append(f"model.vocab_size: {vocab_size} here, {found.model.vocab_size} in {path}")
    if problems:
        raise CheckpointError(f"checkpoint.init_from {spec} is another model; `megalm convert --print-config {spec}` prints its "
                              "section: " + "; ".join(problems))
    return found.weights


def load_foreign(spec: str, engine: Engine, groups: Ranks, model: Model, vocab_size: int) -> None:
    """Fill the engine's weights from elsewhere, each rank its own slices; all ranks call it together.

    Moments and counters stay as they are: a start from those weights. Raises CheckpointError on every rank.
    """
    problem, cause = None, None
    try:
        weights = open_for(spec, model, vocab_size)
        fill_weights(engine.fragments(), weights)
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        problem, cause = (str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"), error
    problems = groups.agree(problem)
    if problems:
        raise CheckpointError(f"{spec} can't be loaded: rank {problems[0][0]}: {problems[0][1]}") from cause
    engine.refresh(engine.counters())


def fill_weights(fragments: Iterable[Fragment], weights: Foreign) -> None:
    """Fill the fragments that are weights. Raises CheckpointError with the first few problems."""
    problems = []
    for fragment in fragments:
        if fragment.role in WEIGHT_ROLES and fragment.count:
            try:
                weights.fill(fragment)
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems[:PROBLEMS_SHOWN]))


def describe(spec: str) -> dict[str, Any]:
    """The keys of the model section that the weights ask for; those that are so by default are left out."""
    kind, path = kind_of(spec)
    if kind != "hf":
        raise CheckpointError(f"{spec}: only hf:PATH says what model it is")
    model = open_huggingface(path).model
    asked = model.model_dump(mode="json", exclude_defaults=True)
    for key in ("num_query_groups", "head_dim", "ffn_hidden_size", "qkv_bias", "mlp_bias"):
        shorter = {name: value for name, value in asked.items() if name != key}
        if Model(**shorter) == model:
            asked = shorter
    return asked
