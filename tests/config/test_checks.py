"""Every impossible combination is one line with the key, the numbers and what would be right; its neighbours are accepted."""
from __future__ import annotations

import pytest

from megalm.config import ConfigError
from megalm.config.checks import DERIVED, FIXED
from tests.config.trees import config

IMPOSSIBLE = [
    (dict(model={"num_attention_heads": 12, "num_query_groups": 12}),
     "model.hidden_size: 64 is not divisible by model.num_attention_heads = 12"),
    (dict(model={"num_query_groups": 3}), "model.num_attention_heads: 8 is not divisible by model.num_query_groups = 3"),
    (dict(model={"num_attention_heads": 4, "num_query_groups": 1}, parallel={"tp": 8}),
     "model.num_attention_heads: 4 is not divisible by parallel.tp = 8"),
    (dict(model={"hidden_size": 96, "num_attention_heads": 24, "num_query_groups": 6}, parallel={"tp": 4}),
     "model.num_query_groups: 6 groups on parallel.tp = 4: one must divide the other"),
    (dict(model={"ffn_hidden_size": 250}, parallel={"tp": 4}), "model.ffn_hidden_size: 250 is not divisible by parallel.tp = 4"),
    (dict(model={"vocab_multiple": 10}, parallel={"tp": 4}), "model.vocab_multiple: 10 is not divisible by parallel.tp = 4"),
    (dict(model={"seq_length": 33}, parallel={"tp": 2, "sequence_parallel": True}),
     "model.seq_length: 33 is not divisible by parallel.tp = 2, as parallel.sequence_parallel asks"),
    (dict(model={"hidden_size": 72, "position_embedding": "rotary"}),
     "rotary needs an even number of rotated elements, not 9 of head_dim 9"),
    (dict(model={"rotary_scaling": {"type": "linear", "factor": 2}}),
     'model.rotary_scaling: has no meaning with model.position_embedding = "learned"'),
    (dict(model={"position_embedding": "rotary", "rotary_scaling": {
        "type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1, "original_seq_length": 8192}}),
     "model.rotary_scaling.high_freq_factor: 1.0 is not above low_freq_factor = 4.0"),
    (dict(parallel={"pp": 5}), "parallel.pp: 5 stages are more than model.num_layers = 4"),
    (dict(parallel={"pp": 2, "stages": [4]}), "parallel.stages: 1 entries for parallel.pp = 2"),
    (dict(parallel={"pp": 2, "stages": [2, 3]}), "parallel.stages: 2+3 = 5, not model.num_layers = 4"),
    (dict(parallel={"pp": 2, "zero_stage": 2}), "parallel.zero_stage: 2 with parallel.pp = 2"),
    (dict(parallel={"pp": 2, "zero_stage": 3}), "parallel.zero_stage: 3 with parallel.pp = 2"),
    (dict(batch={"micro": 3}), "batch.global: 8 is not divisible by batch.micro = 3"),
    (dict(batch={"micro": 2}, parallel={"dp": 3}), "batch.global: 8 is not divisible by batch.micro x parallel.dp = 2 x 3 = 6"),
    (dict(schedule={"min_lr": 0.01}), "schedule.min_lr: 0.01 is above optimizer.lr = 0.001"),
    (dict(schedule={"warmup_steps": 11}), "schedule.warmup_steps: 11 is more than train.steps = 10"),
    (dict(schedule={"decay": "constant", "decay_steps": 3}),
     'schedule.decay_steps: 3 given, but schedule.decay = "constant" has no decay'),
    (dict(schedule={"decay": "wsd", "warmup_steps": 8, "decay_steps": 3}),
     "schedule.decay_steps: 3 + warmup_steps 8 is more than train.steps = 10"),
    (dict(model={"position_embedding": "rotary", "rotary_fraction": 0.1, "head_dim": 8}),
     "rotary needs an even number of rotated elements, not 0 of head_dim 8"),
    (dict(model={"rotary_fraction": 0.5}), 'model.rotary_fraction: has no meaning with model.position_embedding = "learned"'),
    (dict(tokenizer={"path": "x"}), 'tokenizer.path: "x" given, but type "bytes" has no file'),
    (dict(tokenizer={"type": "sentencepiece"}), 'tokenizer.path: missing, type "sentencepiece" needs it'),
    (dict(tokenizer={"eod": "</s>"}), 'tokenizer.eod: "</s>" given, but type "bytes" has its own, 256'),
    (dict(train={"attention_fp8": True}, precision={"dtype": "fp32"}, model={"head_dim": 64}),
     'train.attention_fp8: true with precision.dtype = "fp32"'),
    (dict(train={"attention_fp8": True}, model={"attention_dropout": 0.1, "head_dim": 64}),
     "train.attention_fp8: true with model.attention_dropout = 0.1; fp8 has no dropout"),
    (dict(train={"attention_fp8": True}, kernels={"attention": "torch"}, model={"head_dim": 64}),
     'train.attention_fp8: true with kernels.attention = "torch", which has no fp8; "auto", "megalm" or "reference" expected'),
    (dict(train={"attention_fp8": True}), "train.attention_fp8: true with heads of 8; 64, 128, 256 expected"),
    (dict(train={"eval_every": 5}), "train.eval_every: 5, but data.valid is empty"),
    (dict(deepspeed={"bf16": True}), "deepspeed.bf16: an object expected, true given"),
    (dict(deepspeed={"zero_optimization": 2}), "deepspeed.zero_optimization: an object expected, 2 given"),
    (dict(deepspeed={"zero_optimization": {"reduce_bucket_size": "5e8"}}),
     'deepspeed.zero_optimization.reduce_bucket_size: a number of elements expected, "5e8" given'),
    (dict(deepspeed={"bf16": {"immediate_grad_update": 1}}),
     "deepspeed.bf16.immediate_grad_update: true or false expected, 1 given"),
    (dict(deepspeed={"bf16": {"check_grad_overflow": False}}),
     "deepspeed.bf16.check_grad_overflow: False given, but megalm keeps it true"),
    (dict(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
     "deepspeed.zero_optimization.offload_optimizer: {'device': 'cpu'} given, but megalm doesn't offload yet"),
]

POSSIBLE = [
    dict(model={"hidden_size": 60, "num_attention_heads": 8, "head_dim": 16}),
    dict(model={"position_embedding": "rotary", "rotary_fraction": 0.25, "head_dim": 16, "parallel_residual": True}),
    dict(model={"num_query_groups": 2}, parallel={"tp": 8}),
    dict(model={"num_query_groups": 1}, parallel={"tp": 4}),
    dict(model={"num_query_groups": 4}, parallel={"tp": 2}),
    dict(model={"seq_length": 33}, parallel={"tp": 2}),
    dict(parallel={"pp": 4}),
    dict(parallel={"pp": 2, "stages": [1, 3]}),
    dict(parallel={"zero_stage": 3}),
    dict(parallel={"pp": 2, "zero_stage": 0}),
    dict(schedule={"decay": "wsd", "warmup_steps": 7, "decay_steps": 3}),
    dict(schedule={"warmup_steps": 10}),
    dict(tokenizer={"type": "huggingface", "path": "t.json", "eod": "<eos>"}),
    dict(train={"eval_every": 5}, data={"valid": [{"path": "v"}]}),
    dict(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "bf16": {"immediate_grad_update": True}}),
    dict(deepspeed={"zero_optimization": {"reduce_bucket_size": 5e8}}),
]


@pytest.mark.parametrize("sections, message", IMPOSSIBLE)
def test_impossible(sections, message):
    with pytest.raises(ConfigError) as error:
        config(**sections)
    [problem] = error.value.problems
    assert message in problem


@pytest.mark.parametrize("sections", POSSIBLE)
def test_possible(sections):
    assert config(**sections)


@pytest.mark.parametrize("key", [*DERIVED, *FIXED])
def test_deepspeed_keys_that_megalm_derives(key):
    value: object = 1
    for part in reversed(key.split(".")):
        value = {part: value}
    with pytest.raises(ConfigError) as error:
        config(deepspeed=value)
    [problem] = error.value.problems
    assert problem.startswith(f"deepspeed.{key}: 1 given, but megalm")
    assert DERIVED.get(key, FIXED.get(key)) in problem


def test_derived_keys_name_keys_that_exist():
    from megalm.config.explain import known_keys
    for names in DERIVED.values():
        for name in names.replace(" and ", ", ").split(", "):
            assert name in known_keys()
