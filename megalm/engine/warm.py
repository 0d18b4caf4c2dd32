"""The imports worth doing once, before ranks are forked.

`import deepspeed` takes seconds, and the first `initialize` of a process imports some 1,400 modules more (most of them
through the Muon optimizer), which otherwise every rank pays for. Importing computes nothing: no parallel region is
entered, no group made, so a process that has called `warm` can still be forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

NEEDED = ("torch", "torch.distributed", "deepspeed", "deepspeed.pipe")

# What torch and DeepSpeed import only when they are used. Where a version lacks one, that costs time, not correctness.
LAZY = (
    "setuptools",
    "distutils.ccompiler",
    "torch.profiler._cupti_monitor",
    "torch._subclasses.schema_check_mode",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)


def warm() -> None:
    """Import what a rank will need, then hide it from the garbage collector.

    `gc.freeze` keeps the collections that DeepSpeed runs in each rank from walking, and so copying, every page of the
    parent. Raises ImportError where torch or deepspeed is missing.
    """
    for name in NEEDED:
        importlib.import_module(name)
    for name in LAZY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
