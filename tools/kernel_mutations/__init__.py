"""Bugs to plant in csrc/ (tools/mutate_kernels.py), each of a kind that somebody has made: a dropped barrier, a wrong lane, a
mask off by one, an unguarded load, a forgotten term. `old` stands in its file exactly once, which a test holds."""
from __future__ import annotations

from megalm.tools.kernel_mutations import attention, decode, elementwise, fp8, hopper, norm
from megalm.tools.kernel_mutations.mutation import Mutation

MODULES = (norm, elementwise, attention, hopper, fp8, decode)
MUTATIONS: tuple[Mutation, ...] = tuple(mutation for module in MODULES for mutation in module.MUTATIONS)
