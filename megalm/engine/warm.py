"""The imports worth doing once, before ranks are forked.

`import deepspeed` takes seconds, and the first `initialize` of a process imports some 1,400 modules more (most of them
through the Muon optimizer), which otherwise every rank pays for. Importing computes nothing: no parallel region is
entered, no group made, so a process that has called `warm` can still be forked.
"""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "torch",
    "torch.distributed",
    "torch.nn.functional",
    "torch.utils.checkpoint",
    "torch.profiler._cupti_monitor",
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.pipe.schedule",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "safetensors.torch",
)


def warm() -> None:
    """Import what a rank will need, then freeze the garbage collector's view of it.

    `gc.freeze` keeps the collections that DeepSpeed runs in each rank from walking, and so copying, every page of the
    parent. A module that this version of a library lacks is skipped: its absence costs time, not correctness.
    """
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or "." not in error.name or not name.startswith(error.name):
                raise
    gc.collect()
    gc.freeze()
