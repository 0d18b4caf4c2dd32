"""All operations: importing a file of megalm/ops registers its backends."""
from __future__ import annotations

import importlib
import pkgutil

from megalm import ops
from megalm.ops.registry import REGISTRY, Registry


def registered() -> Registry:
    """The registry with the backends of every operation there is."""
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        importlib.import_module(module.name)
    return REGISTRY
