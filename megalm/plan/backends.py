"""Which kernel backend each operation is meant to run with, from the measured table beside ops, read as data.

Nothing of megalm.ops is imported: it needs torch. The device is not known here, so the order is the one for a device that was not
measured; the run itself logs what it really uses.
"""
from __future__ import annotations

import json
from importlib import resources
from typing import Any

from megalm.config import Config

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as the table spells them


def intended_backends(config: Config) -> dict[str, str]:
    """Operation -> the backend named in the config, or the first that `auto` would take; "auto" where the table has none."""
    table = _table()
    chosen = {}
    for operation, named in config.kernels.model_dump().items():
        traits = {DTYPES[config.precision.dtype]}
        if operation == "attention":
            traits |= {*attention_traits(config)}
        if operation == "norm":
            traits.add(config.model.normalization)
        if operation == "activation":
            traits.add(config.model.activation)
        chosen[operation] = _first(table, operation, traits) if named == "auto" else named
    return chosen


def attention_traits(config: Config) -> tuple[str, ...]:
    """What the model's attention asks of a backend: the traits that its calls have (ops/attention.py, Rules.traits)."""
    fused, dropout, documents = has_attention_kernel(config), config.model.attention_dropout > 0, config.data.document_mask
    narrowed = documents or config.model.sliding_window is not None
    asked = {"documents": documents, "bounds": documents and config.train.compile,  # compiled code doesn't know their lengths
             "masked": narrowed and fused and not dropout, "dropout": dropout, "scores": not fused and not dropout,
             "fp8": config.train.attention_fp8}
    return (*(trait for trait, is_asked in asked.items() if is_asked), _head_dim(config))


def keeps_scores(config: Config, backend: str, device: str | None = None) -> bool:
    """Whether this backend of attention keeps scores of s x s for the backward pass: what recompute.mode selective saves.

    `device`: its type, where it is known. The model and the plan both go by this.
    """
    return _is_listed(config, backend, "keeps_scores", device)


def repeats_groups(config: Config, backend: str) -> bool:
    """Whether this backend of attention repeats a group's keys and values for each of its heads (ops/sdpa.py) on a GPU."""
    return config.model.num_query_groups < config.model.num_attention_heads and _is_listed(config, backend, "repeats_groups")


def sdpa_has_mask(config: Config) -> bool:
    """Whether SDPA is given a mask of s x s: for a window, and for documents whose lengths compiled code doesn't know."""
    return config.model.sliding_window is not None or config.data.document_mask and config.train.compile


def _is_listed(config: Config, backend: str, kinds: str, device: str | None = None) -> bool:
    words = {*attention_traits(config), DTYPES[config.precision.dtype], device}
    facts = {"unfused": not has_attention_kernel(config), "mask": sdpa_has_mask(config),
             "unaligned": config.model.head_dim % (4 if config.precision.dtype == "fp32" else 8) != 0}
    words |= {word for word, is_so in facts.items() if is_so}
    listed = _table().get("backends", {}).get("attention", {}).get(backend, {}).get(kinds, [])
    return any(words.issuperset(kind) for kind in listed)


def has_attention_kernel(config: Config) -> bool:
    """Whether csrc has a kernel of the whole attention for this precision and head dim, which keeps no scores."""
    known = _table().get("backends", {}).get("attention", {}).get("megalm", {}).get("kernels", [])
    return config.precision.dtype != "fp32" and _head_dim(config) in known


def _head_dim(config: Config) -> str:
    return f"head_dim={config.model.head_dim}"


def _table() -> dict[str, Any]:
    file = resources.files("megalm") / "ops" / "backends.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _first(table: dict[str, Any], operation: str, traits: set[str]) -> str:
    """The first backend of the order that neither lacks nor avoids one of the traits, else the first that lacks none."""
    capabilities, order = table.get("backends", {}).get(operation, {}), table.get(operation, [])

    def free_of(name: str, *kinds: str) -> bool:
        return not any(traits & {*capabilities.get(name, {}).get(kind, {})} for kind in kinds)

    serving = [name for name in order if free_of(name, "cannot", "by_name")]
    return next((name for name in serving if free_of(name, "avoid")), serving[0] if serving else "auto")
