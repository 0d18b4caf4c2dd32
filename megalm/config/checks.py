"""Combinations that cannot be: each check names the keys it looks at, the numbers, and what would be right.

A check knows the config alone; what needs the world size or the tokenizer's vocabulary is an error of megalm.plan.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .explain import short
from .schema import Config


class Problem(NamedTuple):
    """`keys` are the dotted paths the message speaks of: it is dropped when one of them is wrong by itself."""
    keys: tuple[str, ...]
    message: str


Check = Callable[[Config], Iterator[Problem]]


def find_problems(config: Config) -> list[Problem]:
    """Every impossible combination in the config, in the order of the file's sections."""
    return [problem for check in CHECKS for problem in check(config)]


def _divides(config: Config, divisor_key: str, key: str, hint: str = "") -> Iterator[Problem]:
    divisor, value = _value(config, divisor_key), _value(config, key)
    if value % divisor:
        yield Problem((key, divisor_key), f"{key}: {value} is not divisible by {divisor_key} = {divisor}{hint}")


def _value(config: Config, key: str) -> int:
    section, name = key.split(".")
    return getattr(getattr(config, section), "global_" if name == "global" else name)


def _heads(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    groups = model.num_query_groups
    if "head_dim" not in model.model_fields_set:
        yield from _divides(config, "model.num_attention_heads", "model.hidden_size", "; model.head_dim can be stated")
    yield from _divides(config, "model.num_query_groups", "model.num_attention_heads")
    yield from _divides(config, "parallel.tp", "model.num_attention_heads")
    if groups % tp and tp % groups:
        yield Problem(("model.num_query_groups", "parallel.tp", "model.num_attention_heads"),
                      f"model.num_query_groups: {groups} groups on parallel.tp = {tp}: one must divide the other, "
                      "so that every tp rank holds whole groups or all of them")
    if model.position_embedding == "rotary" and (model.rotary_dim % 2 or model.rotary_dim == 0):
        yield Problem(("model.head_dim", "model.rotary_fraction", "model.hidden_size", "model.num_attention_heads",
                       "model.position_embedding"),
                      f"model.position_embedding: rotary needs an even number of rotated elements, not {model.rotary_dim} of "
                      f"head_dim {model.head_dim}")


def _widths(config: Config) -> Iterator[Problem]:
    for problem in _divides(config, "parallel.tp", "model.ffn_hidden_size"):
        yield Problem(problem.keys + ("model.hidden_size",), problem.message)  # its default follows from hidden_size
    yield from _divides(config, "parallel.tp", "model.vocab_multiple", "; a multiple of tp keeps the padding free of it")
    if config.parallel.sequence_parallel:
        yield from _divides(config, "parallel.tp", "model.seq_length", ", as parallel.sequence_parallel asks")


def _positions(config: Config) -> Iterator[Problem]:
    model = config.model
    for name, default in (("rotary_scaling", None), ("rotary_fraction", 1.0)):
        if getattr(model, name) != default and model.position_embedding != "rotary":
            yield Problem((f"model.{name}", "model.position_embedding"),
                          f'model.{name}: has no meaning with model.position_embedding = "{model.position_embedding}"')
    low, high = (getattr(model.rotary_scaling, name, None) for name in ("low_freq_factor", "high_freq_factor"))
    if low is not None and high <= low:
        yield Problem(("model.rotary_scaling",),
                      f"model.rotary_scaling.high_freq_factor: {high} is not above low_freq_factor = {low}")


def _pipeline(config: Config) -> Iterator[Problem]:
    layers, pp, stages = config.model.num_layers, config.parallel.pp, config.parallel.stages
    if pp > layers:
        yield Problem(("parallel.pp", "model.num_layers"),
                      f"parallel.pp: {pp} stages are more than model.num_layers = {layers}; every stage needs a layer")
    if stages is not None and len(stages) != pp:
        yield Problem(("parallel.stages", "parallel.pp"), f"parallel.stages: {len(stages)} entries for parallel.pp = {pp}")
    if stages is not None and sum(stages) != layers:
        yield Problem(("parallel.stages", "model.num_layers"),
                      f"parallel.stages: {'+'.join(map(str, stages))} = {sum(stages)}, not model.num_layers = {layers}")
    if config.parallel.zero_stage >= 2 and pp > 1:
        yield Problem(("parallel.zero_stage", "parallel.pp"),
                      f"parallel.zero_stage: {config.parallel.zero_stage} with parallel.pp = {pp}: DeepSpeed's pipeline keeps "
                      "whole gradients and weights; use zero_stage 1, or pp 1 with a larger tp")


def _batch(config: Config) -> Iterator[Problem]:
    batch, dp = config.batch, config.parallel.dp
    if dp == "auto":
        yield from _divides(config, "batch.micro", "batch.global")
    elif batch.global_ % (batch.micro * dp):
        yield Problem(("batch.global", "batch.micro", "parallel.dp"),
                      f"batch.global: {batch.global_} is not divisible by batch.micro x parallel.dp = "
                      f"{batch.micro} x {dp} = {batch.micro * dp}")


def _schedule(config: Config) -> Iterator[Problem]:
    schedule, steps, lr = config.schedule, config.train.steps, config.optimizer.lr
    if schedule.min_lr > lr:
        yield Problem(("schedule.min_lr", "optimizer.lr"), f"schedule.min_lr: {schedule.min_lr} is above optimizer.lr = {lr}")
    if schedule.warmup_steps > steps:
        yield Problem(("schedule.warmup_steps", "train.steps"),
                      f"schedule.warmup_steps: {schedule.warmup_steps} is more than train.steps = {steps}")
    if schedule.decay_steps is None:
        return
    if schedule.decay == "constant":
        yield Problem(("schedule.decay_steps", "schedule.decay"),
                      f'schedule.decay_steps: {schedule.decay_steps} given, but schedule.decay = "constant" has no decay')
    elif schedule.decay == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        yield Problem(("schedule.decay_steps", "schedule.warmup_steps", "train.steps"),
                      f"schedule.decay_steps: {schedule.decay_steps} + warmup_steps {schedule.warmup_steps} is more than "
                      f"train.steps = {steps}")


def _tokenizer(config: Config) -> Iterator[Problem]:
    tokenizer = config.tokenizer
    if tokenizer.type == "bytes" and tokenizer.path is not None:
        yield Problem(("tokenizer.path", "tokenizer.type"),
                      f'tokenizer.path: "{tokenizer.path}" given, but type "bytes" has no file')
    if tokenizer.type != "bytes" and tokenizer.path is None:
        yield Problem(("tokenizer.path", "tokenizer.type"), f'tokenizer.path: missing, type "{tokenizer.type}" needs it')
    if tokenizer.eod is not None and tokenizer.type == "bytes":
        yield Problem(("tokenizer.eod", "tokenizer.type"),
                      f'tokenizer.eod: "{tokenizer.eod}" given, but type "bytes" has its own, 256')


def _evaluation(config: Config) -> Iterator[Problem]:
    if config.train.eval_every and not config.data.valid:
        yield Problem(("train.eval_every", "data.valid"),
                      f"train.eval_every: {config.train.eval_every}, but data.valid is empty; name a data set or use 0 for never")


NO_FP8 = ("torch", "flash_attn")
FP8_HEAD_DIMS = (64, 128, 256)  # of csrc/attention_hopper_fp8_*.cu


def _fp8(config: Config) -> Iterator[Problem]:
    if not config.train.attention_fp8:
        return
    if config.precision.dtype == "fp32":
        yield Problem(("train.attention_fp8", "precision.dtype"),
                      'train.attention_fp8: true with precision.dtype = "fp32"; it is for "bf16" and "fp16"')
    if config.model.attention_dropout > 0.0:
        yield Problem(("train.attention_fp8", "model.attention_dropout"),
                      f"train.attention_fp8: true with model.attention_dropout = {config.model.attention_dropout}; fp8 has no "
                      "dropout of probabilities, which must be 0")
    backend, head_dim = config.kernels.attention, config.model.head_dim
    if backend in NO_FP8:
        yield Problem(("train.attention_fp8", "kernels.attention"),
                      f'train.attention_fp8: true with kernels.attention = "{backend}", which has no fp8; "auto", "megalm" or '
                      '"reference" expected')
    if backend != "reference" and head_dim not in FP8_HEAD_DIMS:
        yield Problem(("train.attention_fp8", "model.head_dim"),
                      f"train.attention_fp8: true with heads of {head_dim}; {', '.join(map(str, FP8_HEAD_DIMS))} expected, "
                      'or kernels.attention = "reference"')


# DeepSpeed's key -> megalm's, or the reason why nobody may set it.
DERIVED = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global, batch.micro and parallel.dp",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "bf16.enabled": "precision.dtype",
    "bfloat16": "precision.dtype",
    "fp16.enabled": "precision.dtype",
    "amp": "precision.dtype",
    "torch_autocast": "precision.dtype",
    "data_types": "precision.dtype",
    "zero_optimization.stage": "parallel.zero_stage",
    "pipeline": "parallel.pp, parallel.stages and recompute.mode",
    "activation_checkpointing": "recompute.mode",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "steps_per_print": "logging.every",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "compile": "train.compile",
    "elasticity": "batch.global",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}
FIXED = {
    "zero_optimization.round_robin_gradients":
        "megalm keeps it false, because DeepSpeed's map from parameters to partitions is wrong with it",
    "zero_optimization.compute_grad_norm":
        "megalm keeps it true, because the norm is logged and tells whether a step must be skipped",
    "bf16.bf16_master_weights_and_grads":
        "megalm keeps it false: masters and accumulated gradients are fp32",
    "bf16.check_grad_overflow":
        "megalm keeps it true: without it a gradient that isn't finite goes into the weights",
    "gradient_allreduce_op":
        "megalm keeps it at mean, which the scale of the loss counts on",
    "zero_optimization.parameter_alignment":
        "megalm keeps it false, so that the plan's bytes are the engine's",
    **dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param",
                     "zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"),
                    "megalm doesn't offload yet: its plans, optimizers and checkpoints know the device's memory only"),
}
# What megalm itself reads of the section, and what it must be; DeepSpeed judges the rest when a run starts.
READ: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "zero_optimization.reduce_bucket_size": ("a number of elements", lambda value: type(value) in (int, float) and value >= 1),
    "bf16.immediate_grad_update": ("true or false", lambda value: type(value) is bool),
}


def _deepspeed(config: Config) -> Iterator[Problem]:
    for section in dict.fromkeys(key.partition(".")[0] for key in (*DERIVED, *FIXED) if "." in key):
        value = config.deepspeed.get(section, {})
        if not isinstance(value, dict):
            yield Problem((f"deepspeed.{section}",), f"deepspeed.{section}: an object expected, {short(value)} given")
    for key, (expected, right) in READ.items():
        value = config.passed_on(key, _ABSENT)
        if value is not _ABSENT and not right(value):
            yield Problem((f"deepspeed.{key}",), f"deepspeed.{key}: {expected} expected, {short(value)} given")
    for table, reason in ((DERIVED, "megalm derives it from {}; set that"), (FIXED, "{}")):
        for key, word in table.items():
            value = config.passed_on(key, _ABSENT)
            if value is not _ABSENT:
                yield Problem((f"deepspeed.{key}",), f"deepspeed.{key}: {value!r} given, but {reason.format(word)}")


_ABSENT = object()

CHECKS: tuple[Check, ...] = (_heads, _widths, _positions, _pipeline, _batch, _schedule, _tokenizer, _evaluation, _fp8,
                            _deepspeed)
