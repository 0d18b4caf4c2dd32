"""DeepSpeed's own JSON, derived from ours. This is its only writer.

All three batch numbers are always given: DeepSpeed derives a missing one by floor division. It ignores a top-level key that
it does not know, and answers other mistakes with pydantic's errors or bare assertions: `check_deepspeed` makes lines of them.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megalm.config import Config, ConfigError
from megalm.config.explain import short
from megalm.engine.grid import adopt_process_group, quiet
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


def check_deepspeed(config: Config, plan: Plan) -> None:
    """Let DeepSpeed read what it will be given; needs no more than torch.distributed. The same on every rank.

    Raises ConfigError, a line a mistake, for keys of the `deepspeed` section that it doesn't know or can't take.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    adopt_process_group()
    section, read = config.deepspeed, _Recorder(ds_config(config, plan))
    try:
        with quiet():
            DeepSpeedConfig(read, _DataParallel(plan.dp))
    except ValidationError as error:
        raise ConfigError(_lines(error, read.asked[-1], section)) from None
    except Exception as error:
        if not section:
            raise  # then it is no mistake of the user's
        key = f"deepspeed.{read.asked[-1]}" if read.asked[-1] in section else "deepspeed"
        raise ConfigError([f"{key}: DeepSpeed refuses it: {' '.join(str(error).split()) or type(error).__name__}"]) from error
    unknown = [_unknown(f"deepspeed.{key}", value, read.asked) for key, value in section.items() if key not in read.asked]
    if unknown:
        raise ConfigError(unknown)


class _DataParallel:
    """As much of an `mpu` as DeepSpeed's config asks for."""

    def __init__(self, size: int):
        self._size = size

    def get_data_parallel_world_size(self) -> int:
        return self._size


class _Recorder(dict):
    """A dictionary that remembers which keys it was asked for: those are the ones that DeepSpeed knows."""

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        self.asked: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.append(str(key))
        return super().__contains__(key)

    def keys(self) -> _Recorder:  # DeepSpeed asks `key in config.keys()`
        return self

    def __copy__(self) -> _Recorder:  # it reads a copy
        return self


def _lines(error: ValidationError, last: str, section: Mapping[str, Any]) -> Iterator[str]:
    """A line for each of pydantic's errors. Its places begin inside the section that was asked for `last`, or at the top."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    known = [field.alias or name for model in DeepSpeedConfigModel.__subclasses__() for name, field in model.model_fields.items()]
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        key = ".".join(("deepspeed", *([] if loc and loc[0] in section else [last]), *loc))
        if item["type"] == "extra_forbidden":
            yield _unknown(key, item["input"], known)
        else:
            yield f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, {short(item['input'])} given"


def _unknown(path: str, value: Any, known: Iterable[str]) -> str:
    above, _, key = path.rpartition(".")
    close = difflib.get_close_matches(key, sorted(set(known)), n=1, cutoff=0.6)
    return f"{path}: unknown key (value {short(value)})" + (f"; did you mean {above}.{close[0]}?" if close else "")
