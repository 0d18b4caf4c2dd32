"""DeepSpeed's own configuration: what it refuses or would ignore is a line of ours, before anything is built."""
from __future__ import annotations

import pytest

from megalm.config import ConfigError
from megalm.engine.ds_config import check_deepspeed
from megalm.plan import make_plan
from tests import dist
from tests.config.trees import config

ACCEPTED = [
    {},
    {"zero_optimization": {"reduce_bucket_size": 3000, "overlap_comm": True, "stage3_param_persistence_threshold": 0}},
    {"bf16": {"immediate_grad_update": True}, "fp16": {"loss_scale_window": 500, "initial_scale_power": 12}},
    {"comms_logger": {"enabled": False}, "flops_profiler": {"enabled": False}, "wall_clock_breakdown": False,
     "communication_data_type": "fp32"},
]
REFUSED = [
    ({"zero_optimization": {"overlap_com": True}},
     ["deepspeed.zero_optimization.overlap_com: unknown key (value true); "
      "did you mean deepspeed.zero_optimization.overlap_comm?"]),
    ({"zero_optimization": {"allgather_bucket_size": "big", "contiguous_gradients": "perhaps"}},
     ["deepspeed.zero_optimization.contiguous_gradients: input should be a valid boolean, unable to interpret input, "
      '"perhaps" given',
      "deepspeed.zero_optimization.allgather_bucket_size: input should be a valid integer, unable to parse string as an integer, "
      '"big" given']),
    ({"fp16": {"loss_scale": -1}}, ["deepspeed.fp16.loss_scale: value error, fp16.loss_scale must be >= 0"]),
    ({"csv_monitor": {"enabled": "perhaps"}}, ["deepspeed.csv_monitor.enabled: input should be a valid boolean"]),
    ({"comms_loger": {"enabled": True}},
     ['deepspeed.comms_loger: unknown key (value {"enabled": true}); did you mean deepspeed.comms_logger?']),
    ({"wall_clok_breakdown": True, "qwerty": 1},
     ["deepspeed.wall_clok_breakdown: unknown key (value true); did you mean deepspeed.wall_clock_breakdown?",
      "deepspeed.qwerty: unknown key (value 1)"]),
    ({"sparse_attention": {}}, ["deepspeed.sparse_attention: DeepSpeed refuses it: DeepSpeed Sparse Attention has been removed"]),
    ({"communication_data_type": "fp8"}, ["deepspeed.communication_data_type: DeepSpeed refuses it: Invalid communication_data"]),
    ({"checkpoint": {"tag_validation": "Loudly"}}, ["deepspeed.checkpoint: DeepSpeed refuses it: Checkpoint config contains"]),
    ({"wall_clock_breakdown": "yes"}, ["deepspeed.wall_clock_breakdown: DeepSpeed refuses it: unsupported operand type"]),
]


def said(rank: int, world: int, sections: list[dict]) -> list[list[str]]:
    """The lines about each `deepspeed` section, on data-parallel ranks that haven't made a group yet."""
    lines = []
    for section in sections:
        described = config(deepspeed=section, batch={"micro": 2, "global": 8})
        try:
            check_deepspeed(described, make_plan(described, world))
            lines.append([])
        except ConfigError as error:
            lines.append(error.problems)
    return lines


@pytest.fixture(scope="module")
def everything() -> list[list[list[str]]]:
    return dist.run(said, 2, [*ACCEPTED, *(section for section, _ in REFUSED)])


def test_what_is_right_is_accepted(everything):
    assert [lines[:len(ACCEPTED)] for lines in everything] == [[[]] * len(ACCEPTED)] * 2


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[next(iter(section)) for section, _ in REFUSED])
def test_what_is_wrong_is_a_line_each(everything, index):
    section, expected = REFUSED[index]
    for rank in everything:
        lines = rank[len(ACCEPTED) + index]
        assert len(lines) == len(expected), lines
        assert all(line.startswith(start) and "\n" not in line for line, start in zip(lines, expected, strict=True)), lines
