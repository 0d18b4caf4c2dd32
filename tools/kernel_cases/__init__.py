"""What every kernel of csrc/ is held to, wherever it runs: in the tests through the shim, in gpu_check on a GPU.

    python -m megalm.tools.kernel_cases build/shim/libmegalm_shim.so [--order N]     # all small cases on the CPU

`small` cases suit the shim, which runs about a million threads a second; `large` ones are for a GPU.
"""
from __future__ import annotations

from megalm.tools.kernel_cases import activation, attention, cross_entropy, decode, dropout, fp8, hopper, norm, rotary, softmax
from megalm.tools.kernel_cases.case import Case

MODULES = (activation, attention, cross_entropy, decode, dropout, fp8, hopper, norm, rotary, softmax)


def small() -> list[Case]:
    """Odd and few: every path of every kernel."""
    return [case for module in MODULES for case in module.small()]


def large() -> list[Case]:
    """As in training."""
    return [case for module in MODULES for case in module.large()]
