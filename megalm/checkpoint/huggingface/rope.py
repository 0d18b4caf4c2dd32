"""Rotary positions as config.json has them: rope_theta and rope_scaling, or (since transformers 5) rope_parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.checkpoint.format import CheckpointError

THETA = 10000.0
LLAMA3 = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
          "original_seq_length": "original_max_position_embeddings"}


def read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """model.rotary_theta and model.rotary_scaling. Raises CheckpointError for a kind of scaling that megalm hasn't."""
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError("rope_parameters: differs from layer to layer, which isn't supported")
    theta = float(given.get("rope_theta", hf.get("rope_theta") or hf.get("rotary_emb_base") or THETA))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = {"type": "linear", "factor": float(given["factor"])}
    elif kind == "llama3":
        scaling = {"type": "llama3", **{ours: given[theirs] for ours, theirs in LLAMA3.items()}}
        scaling = {key: value if key in ("type", "original_seq_length") else float(value) for key, value in scaling.items()}
    else:
        raise CheckpointError(f"rope_scaling.rope_type: {kind!r} isn't supported; default, linear and llama3 are")
    return {"rotary_theta": theta, "rotary_scaling": scaling}


def write_rope(model: Any) -> dict[str, Any]:
    """rope_theta and rope_scaling, which every version of transformers reads."""
    scaling = model.rotary_scaling
    if scaling is None:
        found = None
    elif scaling.type == "linear":
        found = {"rope_type": "linear", "factor": scaling.factor}
    else:
        found = {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in LLAMA3.items()}}
    return {"rope_theta": model.rotary_theta, "rope_scaling": found}
