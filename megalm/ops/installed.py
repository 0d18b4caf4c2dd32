"""What a backend needs of the machine: megalm's own library, or another project's package."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from megalm.ops import library
from megalm.ops.registry import Features, Missing


def megalm_kernels(features: Features) -> str | None:
    """For the `megalm` backends."""
    return library.missing(features.device)


def package(name: str, module: str) -> Missing:
    """For a backend of a package: `module` is one that only the package meant has (the apex on PyPI is another project's)."""

    def missing(features: Features) -> str | None:
        if features.device != "cuda":
            return f"{name} needs a GPU"
        return None if _importable(module) else f"{name} is not installed (no module {module})"

    return missing


@lru_cache(maxsize=64)
def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
