"""Which kernel backend each operation is meant to run with, from the measured table beside ops, read as data.

Nothing of megalm.ops is imported: it needs torch. The run itself logs what it really uses.
"""
from __future__ import annotations

import json
from importlib import resources
from typing import Any

from megalm.config import Config


def intended_backends(config: Config) -> dict[str, str]:
    """Operation -> backend name; "auto" stays where the table names none."""
    table = _table()
    named = config.kernels.model_dump()
    return {operation: _first(table, operation) if backend == "auto" else backend for operation, backend in named.items()}


def _table() -> dict[str, Any]:
    file = resources.files("megalm") / "ops" / "backends.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _first(table: dict[str, Any], operation: str) -> str:
    order = table.get(operation, [])
    return order[0] if isinstance(order, list) and order and isinstance(order[0], str) else "auto"
