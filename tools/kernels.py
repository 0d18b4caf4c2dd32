"""The compiled kernels: what is built, for which targets, and which backend each operation takes here and why.

    megalm kernels [--device cuda|cpu] [--json]
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megalm.tools import build_kernels
from megalm.tools._command import Parser, run

if TYPE_CHECKING:
    from megalm.ops.registry import Registry

DTYPES = ("bfloat16", "float32")
DEVICES = ("cuda", "cpu")
USUAL = {"attention": ("head_dim=128",), "decode": ("head_dim=128",), "activation": ("swiglu",), "norm": ("rms_norm",)}
"""What the calls of a Llama-style model have: traits without which a backend could not tell whether it serves."""


def library_facts() -> dict[str, Any]:
    """What the library for GPUs is, and what is wrong with it: `problem` is None where it can be used."""
    from megalm.ops import library

    about = library.about() or {}
    facts = {"targets": about.get("targets", []), "nvcc": about.get("nvcc"), "problem": library.missing("cuda"),
             "kernels": sorted({build_kernels.kernel_name(entry["kernel"]) for entry in about.get("resources", [])}),
             "not_built": about.get("not_built")}
    if build_kernels.sources():  # a checkout, not an installed package
        facts["up_to_date"] = about.get("sources") == build_kernels.sources_digest()
    return facts


def traits(table: dict[str, Any], op: str) -> list[str]:
    """Properties of a call, beside device and dtype, for which a backend of `op` is passed over."""
    words = {word for reasons in table["backends"].get(op, {}).values()
             for kind in ("cannot", "avoid") for word in reasons.get(kind, {})}
    return sorted(words - {*DEVICES, *DTYPES, "float16", "float64", *USUAL.get(op, ())})


def choice(registry: Registry, op: str, device: str, dtype: str, with_traits: tuple[str, ...] = ()) -> dict[str, Any]:
    """{backend: the one taken or None, others: {name: why not}} of one kind of call."""
    import torch

    from megalm.ops.registry import Features

    features = Features(device, getattr(torch, dtype), (*with_traits, *USUAL.get(op, ())))
    taken, others = None, {}
    for backend, reason in registry.candidates(op, features):
        if reason is None and taken is None:
            taken = backend.name
        else:
            others[backend.name] = reason or f"behind {taken} in the order"
    for backend in registry.backends[op].values():
        if backend.name != taken and backend.name not in others:
            others[backend.name] = backend.supports(features) or "not in the order of this device"
    return {"backend": taken, "others": others}


def operations(registry: Registry, device: str) -> Iterator[dict[str, Any]]:
    """For every operation, and every trait that changes its choice: what is taken, by dtypes that agree."""
    for op in sorted(registry.backends):
        plain = {dtype: choice(registry, op, device, dtype) for dtype in DTYPES}
        yield from _merged(registry, op, device, "", plain)
        for trait in traits(dict(registry.table), op):
            other = {dtype: choice(registry, op, device, dtype, (trait,)) for dtype in DTYPES}
            if any(other[dtype]["backend"] != plain[dtype]["backend"] for dtype in DTYPES):
                yield from _merged(registry, op, device, trait, other)


def _merged(registry: Registry, op: str, device: str, trait: str, found: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    facts = {"operation": op, "with": trait, "measured_on": registry.measured_on(op, device)}
    first = found[DTYPES[0]]
    if any(mine["backend"] != first["backend"] for mine in found.values()):
        yield from ({**facts, "dtypes": [dtype], **mine} for dtype, mine in found.items())
        return
    others = {}
    for name in first["others"]:
        reasons = {dtype: mine["others"][name] for dtype, mine in found.items()}
        differ = len({*reasons.values()}) > 1
        others[name] = "; ".join(f"{dtype}: {reason}" for dtype, reason in reasons.items()) if differ else first["others"][name]
    yield {**facts, "dtypes": list(DTYPES), "backend": first["backend"], "others": others}


def describe(device: str | None) -> dict[str, Any]:
    """All facts as plain JSON values. device: default the GPU where there is one, else the CPU."""
    import torch

    from megalm.tools._ops import registered

    registry = registered()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = device or ("cuda" if gpu else "cpu")
    return {"library": library_facts(), "device": device, "gpu": gpu, "torch": torch.__version__,
            "operations": list(operations(registry, device))}


def table(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for people, line by line."""
    library, gpu = facts["library"], facts["gpu"]
    if library["targets"]:
        yield f"library     {', '.join(library['targets'])}; nvcc {library['nvcc']}; {len(library['kernels'])} kernels"
        if library.get("up_to_date") is False:
            yield "            made from other sources than csrc/ has now: `make kernels` builds it"
    if library["problem"]:
        why = f" (when the package was installed: {library['not_built']})" if library["not_built"] else ""
        yield f"library     {library['problem']}{why}"
    yield f"device      {gpu or 'no GPU, which megalm kernels need'}; torch {facts['torch']}"
    if gpu is None and facts["device"] == "cuda":
        yield "            what follows is for a GPU that was not measured, as far as can be told without one"
    yield ""
    yield f"on {facts['device']}, in a Llama-style model, with kernels.<operation> \"auto\":"
    said: set[tuple[str, str, str]] = set()
    for mine in facts["operations"]:
        name = mine["operation"] + (f", {mine['with']}" if mine["with"] else "")
        dtype = "" if len(mine["dtypes"]) > 1 else mine["dtypes"][0]
        order = f"measured on {mine['measured_on']}" if mine["measured_on"] else "not measured on this device"
        yield f"  {name:22} {dtype:9} {mine['backend'] or 'none':10} {order}"
        for other, reason in mine["others"].items():
            if not reason.startswith("behind ") and (mine["operation"], other, reason) not in said:
                said.add((mine["operation"], other, reason))
                yield f"  {'':32}   not {other}: {reason}"


def _kernels(arguments: argparse.Namespace) -> int:
    facts = describe(arguments.device)
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(table(facts)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    parser = Parser(prog="megalm kernels", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    return run(parser, _kernels, argv)


if __name__ == "__main__":
    sys.exit(main())
