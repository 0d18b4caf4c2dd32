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
            traits |= {"dropout"} if config.model.attention_dropout > 0 else set() if has_attention_kernel(config) else {"scores"}
        if operation == "norm":
            traits.add(config.model.normalization)
        if operation == "activation":
            traits.add(config.model.activation)
        chosen[operation] = _first(table, operation, traits) if named == "auto" else named
    return chosen


def has_attention_kernel(config: Config) -> bool:
    """Whether csrc has a kernel of the whole attention for this precision and head dim, which keeps no scores."""
    known = _table().get("backends", {}).get("attention", {}).get("megalm", {}).get("kernels", [])
    return config.precision.dtype != "fp32" and f"head_dim={config.model.head_dim}" in known


def _table() -> dict[str, Any]:
    file = resources.files("megalm") / "ops" / "backends.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _first(table: dict[str, Any], operation: str, traits: set[str]) -> str:
    """The first backend of the operation's order that neither lacks nor avoids one of the traits."""
    capabilities = table.get("backends", {}).get(operation, {})
    for name in table.get(operation, []):
        reasons = capabilities.get(name, {})
        if not traits & {*reasons.get("cannot", {}), *reasons.get("avoid", {})}:
            return name
    return "auto"
