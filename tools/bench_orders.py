"""The measured order of an operation's backends: from the figures of tools/bench_ops.py to megalm/ops/backends.json. No torch."""
from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

COMPILED = "torch.compile"


def orders(records: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """{operation: its backends, fastest first}, by the geometric mean of their times over the fastest of each workload.

    Of the workloads of an operation's own table where there are some. A backend that could not run some of them is ranked by the
    others; one that could run none is left out.
    """
    records = [record for record in records if record.get("seconds")]
    result = {}
    for op in dict.fromkeys(record["op"] for record in records):
        mine = [record for record in records if record["op"] == op]
        mine = [record for record in mine if record["ranks"]] or mine
        ratios: dict[str, list[float]] = {}
        for record in mine:
            totals = {name: sum(phases.values()) for name, phases in record["seconds"].items() if name != COMPILED}
            for name, total in totals.items():
                ratios.setdefault(name, []).append(math.log(total / min(totals.values())))
        result[op] = sorted(ratios, key=lambda name: sum(ratios[name]) / len(ratios[name]))
    return result


def installed_table() -> Path:
    """backends.json of the installed package."""
    return Path(str(resources.files("megalm.ops") / "backends.json"))


def write_orders(path: Path, device: str, found: dict[str, list[str]]) -> None:
    """Put the orders of a device into a table, which is made from the installed one where it isn't there."""
    source = path if path.exists() else installed_table()
    table = json.loads(source.read_text(encoding="utf-8"))
    table.setdefault("measured", {}).setdefault(device, {}).update(found)
    path.write_text(format_table(table), encoding="utf-8")


def format_table(value: Any, indent: str = "", width: int = 120) -> str:
    """JSON with what fits on a line on one."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or (len(indent) + len(flat) <= width and indent):
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        items, (first, last) = [f"{json.dumps(key)}: {format_table(item, inner, width)}" for key, item in value.items()], "{}"
    else:
        items, (first, last) = [format_table(item, inner, width) for item in value], "[]"
    body = ",\n".join(inner + item for item in items)
    return f"{first}\n{body}\n{indent}{last}" + ("" if indent else "\n")
