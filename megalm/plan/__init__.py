"""What follows from the config: pure arithmetic on the standard library, so that a login node without torch can plan."""
from __future__ import annotations

from .errors import PlanError
from .plan import Plan, make_plan
from .topology import Place

__all__ = ["Place", "Plan", "PlanError", "make_plan"]
