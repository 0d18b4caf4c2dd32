"""The table of a run of tools/gpu_check.py, and what of it failed. Reads its JSON; imports no torch."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalm.tools.bench_orders import orders

Document = dict[str, Any]


def failures(document: Document) -> list[str]:
    """Stages and items that failed and targets that were not met, in words."""
    found = []
    for stage, part in document["stages"].items():
        if part["status"].startswith("failed") or (stage == "build" and part["status"] != "done"):
            found.append(f"{stage}: {part['status']}")
        for result in part["results"]:
            if "failed" in result:
                found.append(f"{stage}, {result['name']}: {result['failed']}")
            found += [f"{stage}, {result['name']}: {verdict['asked']}: NOT MET, {verdict['got']:.3f}"
                      for verdict in result.get("targets", ()) if not verdict["met"]]
    return found + [f"train: {line}" for line in _uneven(document)]


def parity(document: Document) -> list[dict[str, Any]]:
    """For each model: the largest difference of a loss from the reference backends' at the same step, by set of backends.

    `met`: megalm's is at most twice torch's, or within a rounding of a bf16 logit.
    """
    runs: dict[str, dict[str, list[float]]] = {}
    for result in document["stages"].get("train", {}).get("results", ()):
        if "losses" in result:
            runs.setdefault(result["model"], {})[result["set"]] = result["losses"]
    found = []
    for model, sets in runs.items():
        base = "reference" if "reference" in sets else "torch"
        if base not in sets:
            continue
        away = {name: max(abs(a - b) for a, b in zip(losses, sets[base], strict=True))
                for name, losses in sets.items() if name != base}
        allowed = max(2 * away.get("torch", 0.0), 2.0**-8 * max(map(abs, sets[base])))
        found.append({"model": model, "from": base, "steps": len(sets[base]), "largest": away, "allowed": allowed,
                      "met": away.get("megalm", 0.0) <= allowed})
    return found


def _uneven(document: Document) -> list[str]:
    return [f"{entry['model']}: a loss is {entry['largest']['megalm']:.2g} from {entry['from']}'s, allowed {entry['allowed']:.2g}"
            for entry in parity(document) if not entry["met"]]


def markdown(document: Document) -> str:
    """The whole run for people."""
    versions = ", ".join(f"{name} {version}" for name, version in document.get("versions", {}).items())
    lines = [f"# {document['device']}, {document.get('date', '')}", "", versions, ""]
    lines += [f"driver, clocks and power: {document['driver']}", ""] if document.get("driver") else []
    for stage, write in SECTIONS.items():
        part = document["stages"].get(stage)
        if part is None:
            continue
        lines += [f"## {stage}", "", f"{part['status']}; {len(part['results'])} of {part['items']} results", ""]
        lines += [*write(document, part["results"]), ""]
    problems = failures(document)
    lines += ["## What failed or was not met", "", *([f"- {problem}" for problem in problems] or ["Nothing that was tried."]), ""]
    return "\n".join(lines)


def _build(document: Document, results: list[dict]) -> Iterator[str]:
    for result in results:
        facts = {key: value for key, value in result.items() if key not in ("name", "output")}
        yield f"- {result['name']}: " + ", ".join(f"{key} {value}" for key, value in facts.items())


def _cases(document: Document, results: list[dict]) -> Iterator[str]:
    passed = [result for result in results if "failed" not in result]
    yield f"{len(passed)} of {len(results)} cases: within twice torch's error from float64, and the same bits twice. The worst:"
    yield ""
    yield "| cases | passed | largest error over torch's |"
    yield "|---|--:|--:|"
    for group in dict.fromkeys(" ".join(result["name"].split()[:2]) for result in results):
        mine = [result for result in results if " ".join(result["name"].split()[:2]) == group]
        ratios = [result["ratio"] for result in mine if "ratio" in result]
        yield f"| {group} | {sum('failed' not in result for result in mine)} of {len(mine)} | {max(ratios, default=0.0):.2f} |"


def _bench(document: Document, results: list[dict]) -> Iterator[str]:
    measured = next((result["ceilings"] for result in results if "ceilings" in result), None)
    if measured:
        yield (f"Ceilings of this run: copy {measured['copy'] / 1e9:.0f} GB/s, read and written; "
               f"bf16 product {measured['matmul'] / 1e12:.1f} TFLOP/s.")
        yield ""
    yield "| workload | phase | microseconds and fraction of the ceiling, fastest first | asked |"
    yield "|---|---|---|---|"
    for result in results:
        for phase in result.get("seconds") and result["work"] or ():
            ranked = sorted(result["seconds"].items(), key=lambda item: item[1][phase])
            times = ", ".join(f"{name} {seconds[phase] * 1e6:.1f} ({result['fractions'][name][phase]:.3f})"
                              for name, seconds in ranked)
            asked = "; ".join(f"{verdict['asked']}: {'met' if verdict['met'] else '**NOT MET**'} ({verdict['got']:.3f})"
                              for verdict in result["targets"] if verdict["asked"].split()[0] in (phase, "at"))
            yield f"| {result['name']} | {phase} | {times} | {asked} |"
    yield ""
    yield from (f"- order of {op}: {', '.join(order)}" for op, order in orders(results).items())
    yield from (f"- {result['name']}: {result['failed']}" for result in results if "failed" in result)


def _train(document: Document, results: list[dict]) -> Iterator[str]:
    yield "| model | backends | tokens/s | step, ms | MFU, causal half | MFU, whole square | peak GB | first and last loss |"
    yield "|---|---|--:|--:|--:|--:|--:|---|"
    for result in results:
        if "losses" not in result:
            yield f"| {result['name']} | {result.get('failed') or result.get('skipped')} |||||||"
            continue
        mfu = [f"{result[key]:.3f}" if key in result else "" for key in ("mfu", "mfu_full")]
        peak = f"{result['peak_allocated'] / 1e9:.1f}" if "peak_allocated" in result else ""
        speed = f"{result['tokens_per_second']:.0f} | {1e3 * result['step_seconds']:.1f}"
        yield (f"| {result['model']} | {result['set']} | {speed} | "
               f"{mfu[0]} | {mfu[1]} | {peak} | {result['losses'][0]:.4f}, {result['losses'][-1]:.4f} |")
    for entry in parity(document):
        away = ", ".join(f"{name} {value:.2g}" for name, value in entry["largest"].items())
        yield ""
        yield (f"{entry['model']}: largest difference of {entry['steps']} losses from {entry['from']}'s: {away} "
               f"({'met' if entry['met'] else 'NOT MET'}: allowed {entry['allowed']:.2g})")


def _sanitize(document: Document, results: list[dict]) -> Iterator[str]:
    for result in results:
        yield f"- {result['name']}: {result.get('failed') or result.get('skipped') or result['summary']}"


SECTIONS = {"build": _build, "cases": _cases, "bench": _bench, "train": _train, "sanitize": _sanitize}
