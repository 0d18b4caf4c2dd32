"""Times every operation's backends, forward and backward apart, as fractions of what this device can copy and multiply.

    python -m megalm.tools.bench_ops                                  # on the GPU; --device cpu: on the CPU, small shapes
    python -m megalm.tools.bench_ops --ops norm rotary --figures found.json
    python -m megalm.tools.bench_ops --write                          # and puts the measured order into ops/backends.json
    python -m megalm.tools.bench_ops --from benchmarks/gpu/X.json --write      # the order of figures that were measured before

A fraction is the bytes that must be read and written once (tools/bench_workloads.py), over the time, over the rate of a large
copy in the same run; or FLOPs over the rate of a bf16 matrix product. torch.compile gets the plain definition.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.ops.library import use_shim
from megalm.tools._command import Parser, run
from megalm.tools.bench_clock import Call, ceilings, clock_of, input_sets, measure
from megalm.tools.bench_orders import COMPILED, installed_table, orders, write_orders
from megalm.tools.bench_workloads import SIZES, WHOLE, Workload, asked, memory_asked, operations, workloads


class Bench:
    """One device, its ceilings and how thoroughly to look."""

    def __init__(self, device: str, size: str, compiler: str = "inductor"):
        self.device, self.size, self.compiler, self.quick = device, size, compiler, size == "tiny"
        self.ceilings = ceilings(device, size, self.quick)

    def facts(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "size": self.size,
                "ceilings": self.ceilings}

    def race(self, workload: Workload, compiled: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
        """Everything about one workload, as JSON: seconds and fractions by backend and phase, who could not, and the targets.

        compiled: torch.compile takes part. only: of the backends, these.
        """
        inputs = workload.inputs(self.device)
        work = workload.work(inputs, _results(workload, inputs))
        sets = [inputs]
        sets += [workload.inputs(self.device) for _ in range(input_sets(self.device, sum(work.values())) - 1)] \
            if workload.ceiling == "copy" else []
        found: dict[str, Any] = {
            "op": workload.op, "name": workload.name, "dtype": str(workload.dtype).removeprefix("torch."),
            "ranks": workload.own and not only, "ceiling": workload.ceiling, "work": work, "skipped": {}, "memory": {},
        }  # fmt: skip
        contenders: dict[str, list[dict[str, Call]]] = {}
        for name, call in self._contenders(workload, compiled, only).items():
            try:
                contenders[name] = [_calls(workload, call, tensors) for tensors in sets]
                found["memory"][name] = self._try(contenders[name])
            except (ValueError, ImportError, RuntimeError) as error:  # it doesn't serve, isn't there, or runs out of memory
                raise_if_broken(error)
                contenders.pop(name, None)
                found["skipped"][name] = first_line(error)
        times = {phase: measure({name: [calls[phase] for calls in mine] for name, mine in contenders.items()},
                                clock_of(self.device, self.quick)) for phase in workload.phases}
        found["seconds"] = {name: {phase: times[phase][name] for phase in workload.phases} for name in contenders}
        found["fractions"] = {name: {phase: work[phase] / seconds[phase] / self.ceilings[workload.ceiling]
                                     for phase in workload.phases} for name, seconds in found["seconds"].items()}
        return {**found, "targets": list(verdicts(found)) if self.size == "full" else []}

    def _contenders(self, workload: Workload, compiled: bool, only: Sequence[str]) -> dict[str, Callable]:
        backends = [name for name in operations()[workload.op] if not only or name in only]
        calls = {name: partial(workload.prepare if workload.prepare else workload.run, backend=name) for name in backends}
        if compiled:
            torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # or its backward pass could run only once
            rival = workload.rival or partial(workload.run, backend=workload.compiled)
            calls[COMPILED] = torch.compile(rival, dynamic=False, backend=self.compiler)
        return calls

    def _try(self, sets: list[dict[str, Call]]) -> float | None:
        """One call of each phase; the most bytes that a second one takes beyond what was there, None on a CPU."""
        for call in sets[0].values():
            call()
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for call in sets[0].values():
            call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _results(workload: Workload, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the plain backend, for the sizes."""
    if workload.flops is not None or workload.prepare is not None:
        return ()
    with torch.no_grad():
        results = workload.run(*[tensor.clone() for tensor in inputs], backend="torch")
    return results if isinstance(results, tuple) else (results,)


def _calls(workload: Workload, call: Callable, inputs: Sequence[Tensor]) -> dict[str, Call]:
    """A function without arguments for each phase. Backward passes go through the graph of one forward pass again and again."""
    if workload.prepare is not None:
        return {"step": call(list(inputs))}
    if workload.phases == WHOLE and workload.flops is None:
        return {"step": lambda: call(*inputs)}  # the operation gives its gradient itself
    # Tables of rotary positions and weights of tokens have other dtypes, and nobody trains them.
    leaves = [tensor.detach().requires_grad_(tensor.dtype == workload.dtype) for tensor in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if workload.phases == WHOLE:
        return {"step": lambda: torch.autograd.grad(call(*leaves), wanted)}
    results = call(*leaves)
    results = [result for result in (results if isinstance(results, tuple) else (results,)) if result.requires_grad]
    grads = [torch.randn_like(result) for result in results]
    return {"forward": lambda: call(*leaves),
            "backward": lambda: torch.autograd.grad(results, wanted, grads, retain_graph=True, allow_unused=True)}


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def raise_if_broken(error: BaseException) -> None:
    """After an error of the GPU itself nothing more can be measured in this process."""
    if "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError):
        raise error


def verdicts(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is asked of `megalm` for this workload and whether it was met: fractions, memory, to be ahead of torch.compile.

    Kernels that could not run at all have met nothing.
    """
    fractions, seconds = found["fractions"].get("megalm"), found["seconds"].get("megalm")
    for target in asked(found["name"]):
        for phase in target.phases:
            got = 0.0 if fractions is None else fractions[phase]
            yield {"asked": f"{phase} >= {target.least:.2f} of the {found['ceiling']} ceiling", "got": got,
                   "met": got >= target.least}
    if seconds is None:
        return
    if COMPILED in found["seconds"]:
        for phase, rival in found["seconds"][COMPILED].items():
            yield {"asked": f"{phase} ahead of {COMPILED}", "got": rival / seconds[phase], "met": seconds[phase] <= rival}
    most, took = memory_asked(found["name"]), found["memory"].get("megalm")
    if took is not None and most < math.inf:
        yield {"asked": f"at most {most / 1e9:.2f} GB beyond the inputs", "got": took / 1e9, "met": took <= most}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """One workload for people."""
    for phase in found["work"]:
        yield f"{found['name']} {found['dtype']}, {phase}"
        for name, seconds in sorted(found["seconds"].items(), key=lambda item: item[1][phase]):
            fraction = f"{found['fractions'][name][phase]:.3f} of the {found['ceiling']} ceiling"
            yield f"    {name:14} {seconds[phase] * 1e6:11.1f} us   {fraction}"
    for name, reason in found["skipped"].items():
        yield f"    {name:14} not run: {reason}"
    for verdict in found["targets"]:
        yield f"    {'met' if verdict['met'] else 'NOT MET':8} {verdict['asked']}: {verdict['got']:.3f}"


# ---- the program -----------------------------------------------------------------------------------------------------


def bench(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Returns 0, or 1 where a target was not met."""
    if arguments.shim and (arguments.write or arguments.out or arguments.device == "cuda"):
        raise ValueError("--shim runs the kernels on the CPU, thousands of times slower than a GPU: there is no order to write")
    if arguments.source:
        facts = json.loads(arguments.source.read_text(encoding="utf-8"))
        records = facts["stages"]["bench"]["results"] if "stages" in facts else facts["workloads"]
    else:
        facts, records = _measure(arguments)
    for op, order in (found := orders(records)).items():
        print(f"order of {op} on {facts['device']}: {', '.join(order)}")
    if arguments.write or arguments.out:
        path = arguments.out or installed_table()
        write_orders(path, facts["device"], found)
        print(f"written to {path}")
    return 0 if all(verdict["met"] for record in records for verdict in record.get("targets", ())) else 1


def _measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    device = arguments.device or ("cuda" if torch.cuda.is_available() and not arguments.shim else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --device cpu times what runs on the CPU")
    size = arguments.size or ("full" if device == "cuda" else "tiny" if arguments.shim else "small")
    unknown = sorted(set(arguments.ops) - set(operations()))
    if unknown:
        raise ValueError(f"no operation {', '.join(unknown)}; there are {', '.join(sorted(operations()))}")
    if arguments.shim:
        use_shim(arguments.shim)
    compiled = device == "cuda" if arguments.compile is None else arguments.compile
    machine = Bench(device, size)
    facts, records = machine.facts(), []
    copies, multiplies = machine.ceilings["copy"] / 1e9, machine.ceilings["matmul"] / 1e12
    print(f"{facts['device']}: copies {copies:.1f} GB/s, multiplies {multiplies:.2f} TFLOP/s in bf16")
    for workload in workloads(size, arguments.ops):
        records.append(machine.race(workload, compiled and workload.prepare is None))
        print("\n".join(lines(records[-1])), flush=True)
        if arguments.figures:
            arguments.figures.write_text(json.dumps({**facts, "workloads": records}, indent=1) + "\n")
    return facts, records


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="bench_ops", description=__doc__.splitlines()[0])
    result.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    result.add_argument("--ops", nargs="*", default=[], help="default: all of the registry")
    result.add_argument("--size", choices=SIZES, help="of the shapes; default: full on a GPU, small on a CPU, tiny with --shim")
    result.add_argument("--compile", action=argparse.BooleanOptionalAction, help="race torch.compile too; default: on a GPU")
    result.add_argument("--shim", type=Path, metavar="LIB", help="try the kernels on the CPU, through this library")
    result.add_argument("--figures", type=Path, help="a JSON file for all that was measured")
    result.add_argument("--from", dest="source", type=Path, help="figures of before, of this program or of gpu_check")
    result.add_argument("--write", action="store_true", help="put the measured order into the installed backends.json")
    result.add_argument("--out", type=Path, help="put it into this file instead")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    sys.exit(main())
