"""Optimizers, their parameter groups, and the learning rate."""

from megalm.optim.optimizer import build_optimizer
from megalm.optim.param_groups import param_groups
from megalm.optim.schedule import lr_at

__all__ = ["build_optimizer", "lr_at", "param_groups"]
