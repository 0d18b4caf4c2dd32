"""From text to micro-batches: tokenizer, indexed (.bin/.idx), samples, blend, sampler, loader.

The names below are loaded when first used, so that preparing data imports no torch:

    dataset = build_dataset(config.data.train, seq_length, num_samples, seed, cache_dir)
    loader = Loader(dataset, global_batch=64, micro_batch=4, dp=2, dp_rank=0, needs_tokens=True, eod=2, mask_eod=False)
    for micro_batch in loader.batch(0): ...
"""
from __future__ import annotations

import importlib

_HOME = {
    "DataError": "errors",
    "IndexedReader": "indexed",
    "IndexedWriter": "indexed",
    "load_tokenizer": "tokenizer",
    "Source": "blend",
    "build_dataset": "blend",
    "cache_folder": "cache",
    "Loader": "loader",
    "MicroBatch": "loader",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import the module that holds `name` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
