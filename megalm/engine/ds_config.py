"""DeepSpeed's own JSON, derived from ours. This is its only writer.

All three batch numbers are always given: DeepSpeed derives a missing one by floor division and ignores keys it does not know.
"""

from __future__ import annotations

import copy
from typing import Any

from megalm.config import Config
from megalm.plan import Plan
from megalm.plan.memory import REDUCE_BUCKET


def ds_config(config: Config, plan: Plan) -> dict[str, Any]:
    """The dictionary handed to DeepSpeedConfig; the user's `deepspeed` section is merged underneath ours."""
    derived: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": 0.0 if plan.zero_stage == 0 else config.optimizer.clip_grad_norm,
        "zero_optimization": {"stage": plan.zero_stage,
                              "reduce_bucket_size": config.passed_on("zero_optimization.reduce_bucket_size", REDUCE_BUCKET)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,  # megalm's own metrics report the steps
        # Partitioning what crosses a stage boundary assumes equal activations on all tp ranks, which sequence
        # parallelism breaks silently; recomputation is the model's own.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0,
                     "use_reentrant": False},
    }
    if config.precision.dtype == "bf16":
        derived |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if config.precision.dtype == "fp16":
        derived |= {"fp16": {"enabled": True}}
    return _merge(copy.deepcopy(dict(config.deepspeed)), derived)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; sections present in both are merged key by key."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            value = _merge(below[key], value)
        below[key] = value
    return below
