"""The stages of tools/gpu_check.py as lists of items, and the worker that runs some of them in this process."""
from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from megalm.tools import build_kernels
from megalm.tools.gpu.supervise import command

BROKEN = 3  # exit code: the GPU is in error, a new process has to go on
ASKED_SHAPES = 3  # of tools/bench_attention.py, which come first
MANY, DRAWS = 1 << 20, 10  # elements whose largest error is no luck; draws that decide about fewer
TARGETS = {(9, 0): "sm_90a", (10, 0): "sm_100a"}  # by compute capability; sm_80's PTX serves all others
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "apex", "liger_kernel", "flash_attn", "numpy", "pydantic")


class Settings(NamedTuple):
    """What the supervisor tells a worker: `first` item and how many (None: all), in which file to answer."""

    stage: str
    first: int
    count: int | None
    out: str
    dry_run: bool
    shim: str | None
    seed: int
    op: str = ""  # of a probe

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


class Item(NamedTuple):
    name: str
    run: Callable[[], dict[str, Any]]


def work(order: str) -> int:
    """Run the items that the order names, a line of JSON for each begin and end. Returns the exit code."""
    settings = Settings(**json.loads(order))
    with open(settings.out, "a", encoding="utf-8") as answers:
        def answer(**event: Any) -> None:
            print(json.dumps(event), file=answers, flush=True)

        items = ITEMS[settings.stage](settings)
        answer(items=len(items))
        end = len(items) if settings.count is None else min(len(items), settings.first + settings.count)
        for index in range(settings.first, end):
            answer(begin=index, name=items[index].name)
            start, broken = time.monotonic(), False
            try:
                result = items[index].run()
            except Exception as error:
                traceback.print_exc()
                result, broken = {"failed": f"{type(error).__name__}: {_first_line(error)}"}, "CUDA error" in str(error)
            answer(end=index, result=result, took=round(time.monotonic() - start, 2))
            if broken:
                return BROKEN
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:400]


# ---- machine ---------------------------------------------------------------------------------------------------------


def machine(settings: Settings) -> list[Item]:
    return [Item("machine", partial(_machine, settings))]


def _machine(settings: Settings) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    facts: dict[str, Any] = {"device": "cpu", "versions": versions, "nvcc": build_kernels.find_nvcc()}
    if settings.dry_run:
        return facts
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --dry-run shows the stages on a CPU")
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else None
    return {**facts, "device": found.name, "capability": list(torch.cuda.get_device_capability(0)), "memory": found.total_memory,
            "multiprocessors": found.multi_processor_count, "l2": getattr(found, "L2_cache_size", None), "driver": smi}


# ---- build -----------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> list[Item]:
    return [Item("compile", partial(_compile, settings)), Item("load", partial(_load, settings))]


def shim_folder(settings: Settings) -> Path:
    return Path(settings.shim).parent if settings.shim else build_kernels.ROOT / "build/shim"


def _compile(settings: Settings) -> dict[str, Any]:
    """For this GPU only, unless a library of the same sources already has code for it."""
    if settings.dry_run:
        return {"library": settings.shim or str(build_kernels.build_shim(shim_folder(settings)))}
    import torch

    target = TARGETS.get(torch.cuda.get_device_capability(), "sm_80")
    about = build_kernels.LIBRARY_FOLDER / build_kernels.ABOUT
    known = json.loads(about.read_text()) if about.exists() else {}
    stale = bool(build_kernels.sources()) and known.get("sources") != build_kernels.sources_digest()
    if stale or target not in known.get("targets", []):
        build_kernels.build_cuda(targets=sorted({target, *known.get("targets", [])}), report=lambda line: print(line, flush=True))
        known = json.loads(about.read_text())
    resources = known["resources"]
    return {"targets": known["targets"], "nvcc": known["nvcc"], "compile_seconds": known["seconds"], "kernels": len(resources),
            "spills": build_kernels.over_budget([entry for entry in resources if entry["target"] == target])}


def use_kernels(settings: Settings) -> None:
    """Have the kernels of this run serve. Raises RuntimeError where they can't."""
    import torch

    from megalm.ops import library

    if settings.dry_run:
        torch.set_num_threads(1)  # tiny work: other threads would only be waited for
        library.use_shim(Path(settings.shim) if settings.shim else shim_folder(settings) / "libmegalm_shim.so")
    reason = library.missing(settings.device)
    if reason is not None:
        raise RuntimeError(reason)


def _load(settings: Settings) -> dict[str, Any]:
    use_kernels(settings)
    case = _all_cases(settings)[0][1]
    case.check(case.dtypes[0], settings.device)
    return {"first_case": case.name}


# ---- cases -----------------------------------------------------------------------------------------------------------


def _all_cases(settings: Settings) -> list[tuple[str, Any]]:
    """(size, case): the small ones, then the large ones; of a dry run the first two small ones of each module."""
    from megalm.tools import kernel_cases

    if settings.dry_run:
        return [("small", case) for module in kernel_cases.MODULES for case in module.small()[:2]]
    large = in_turn([module.large() for module in kernel_cases.MODULES])
    return [*(("small", case) for case in kernel_cases.small()), *(("large", case) for case in large)]


def in_turn(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """The first of each, the second of each and so on: where time ends, every operation has had some."""
    missing = object()
    return [item for row in zip_longest(*lists, fillvalue=missing) for item in row if item is not missing]


def cases(settings: Settings) -> list[Item]:
    """The small ones first, then what torch's own attention promises, then the large ones."""
    from megalm.tools.gpu import sdpa

    use_kernels(settings)
    found: dict[str, list[Item]] = {"small": [], "large": []}
    for size, case in _all_cases(settings):
        found[size].append(Item(f"{size}: {case.name}", partial(_case, settings, case)))
    rows = sdpa.ROWS[:2] if settings.dry_run else sdpa.ROWS
    return [*found["small"], *(Item(row.name, partial(sdpa.check, row, settings.device)) for row in rows), *found["large"]]


def _case(settings: Settings, case: Any) -> dict[str, Any]:
    """Errors by dtype, the largest over torch's, and whether a second run gives the same bits where that is promised."""
    found: dict[str, Any] = {"errors": {}, "ratio": 0.0}
    for dtype in case.dtypes[:1] if settings.dry_run else case.dtypes:
        name = str(dtype).removeprefix("torch.")
        found["errors"][name] = errors = _errors(settings, case, dtype)
        found["ratio"] = max([found["ratio"], *(ours / plain for ours, plain in errors if plain > 0)])
        if case.repeats and not _drawn(settings, 0, lambda dtype=dtype: _repeats(case, dtype, settings.device)):
            return {**found, "failed": f"{name}: two runs on the same inputs differ in their bits"}
    return found


def _errors(settings: Settings, case: Any, dtype: Any) -> list[tuple[float, float]]:
    """(ours, torch's) of each result. The largest error of few elements is a matter of luck: more draws decide."""
    import torch

    from megalm.tools.kernel_cases.accuracy import judge

    found = _drawn(settings, 0, lambda: case.compare(dtype, settings.device))
    try:
        return judge(found, dtype)
    except AssertionError:
        if max(exact.numel() for _, _, exact in found) > MANY:
            raise
    draws = [found, *(_drawn(settings, draw, lambda: case.compare(dtype, settings.device)) for draw in range(1, DRAWS))]

    def together(index: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([draw[index][side].flatten() for draw in draws]) for side in range(3))

    return judge([together(index) for index in range(len(found))], dtype)


def _drawn(settings: Settings, draw: int, run: Callable[[], Any]) -> Any:
    """`run` on new inputs, made on its device where the case allows it: some put theirs together from parts on the CPU."""
    from megalm.tools.kernel_cases.accuracy import fresh

    offset = settings.seed + 1_000_003 * draw
    try:
        with fresh(offset, settings.device):
            return run()
    except RuntimeError as error:
        if "same device" not in str(error):
            raise
    with fresh(offset, "cpu"):
        return run()


def _repeats(case: Any, dtype: Any, device: str) -> bool:
    import torch

    from megalm.tools.kernel_cases.accuracy import outputs

    tensors, grads = case.inputs(), None if case.grads is None else case.grads()
    first, second = (outputs(partial(case.run, backend="megalm"), tensors, dtype, device, grads) for _ in range(2))
    return all(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in zip(first, second, strict=True))


# ---- bench -----------------------------------------------------------------------------------------------------------


def bench(settings: Settings) -> list[Item]:
    """The tables first, with the attention kernels that targets are asked of, then megalm's kernels against torch.compile, which
    takes long to compile, then the rest."""
    from megalm.tools import bench_attention
    from megalm.tools.bench_clock import fp8_ceiling
    from megalm.tools.bench_ops import Bench
    from megalm.tools.bench_orders import COMPILED
    from megalm.tools.bench_workloads import operations, workloads

    use_kernels(settings)
    made = Bench(settings.device, "tiny" if settings.dry_run else "full", "eager" if settings.dry_run else "inductor")
    found = workloads(made.size)
    duels = in_turn([[workload for workload in found if workload.op == op and workload.duel] for op in operations()])
    duels = duels[:1] if settings.dry_run else duels
    race = partial(bench_attention.race, device=made.device, matmul=made.ceilings["matmul"],
                   fp8=fp8_ceiling(made.device, made.size, made.quick), quick=made.quick)
    kernels = [Item(f"{shape.name} by kernel", partial(race, shape))
               for shape in ([bench_attention.TINY] if settings.dry_run else bench_attention.shapes())]
    return [Item("ceilings", made.facts),
            *(Item(workload.name, partial(made.race, workload)) for workload in found if workload.own),
            *kernels[:ASKED_SHAPES],
            *(Item(f"{workload.name} against {COMPILED}", partial(made.race, workload, True, ("megalm",))) for workload in duels),
            *(Item(workload.name, partial(made.race, workload)) for workload in found if not workload.own),
            *kernels[ASKED_SHAPES:]]


# ---- train -----------------------------------------------------------------------------------------------------------


def train(settings: Settings) -> list[Item]:
    missing = [name for name in ("deepspeed", "pydantic", "hjson") if find_spec(name) is None]
    if missing:
        return [Item("train", lambda: {"skipped": f"no {', '.join(missing)}; `make gpu-bundle` gathers them"})]
    from megalm.tools.gpu.training import DRY_RUN, RUNS, train

    use_kernels(settings)
    return [Item(str(run), partial(train, run, settings.device)) for run in (DRY_RUN if settings.dry_run else RUNS)]


# ---- sanitize --------------------------------------------------------------------------------------------------------

SANITIZER = "compute-sanitizer"


def _op_of(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


def sanitize(settings: Settings) -> list[Item]:
    """memcheck, then racecheck, a process for each module of cases."""
    program = shutil.which(SANITIZER)
    if program is None:
        return [Item(SANITIZER, lambda: {"skipped": f"no {SANITIZER} on PATH"})]
    from megalm.tools import kernel_cases

    ops = [_op_of(module) for module in kernel_cases.MODULES]
    return [Item(f"{tool}: {op}", partial(_sanitize, settings, program, tool, op))
            for tool in ("memcheck", "racecheck") for op in ops]


def _sanitize(settings: Settings, program: str, tool: str, op: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("r") as answers:
        order = settings._replace(stage="probe", op=op, first=0, count=None, out=answers.name)
        # Without torch's cache of memory an access beyond a tensor is one beyond an allocation. torch asks the driver for things
        # that may not be there: memcheck would count every such answer as an error.
        options = ["--tool", tool, "--error-exitcode", "86", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
        done = subprocess.run(["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, *options, *command(), "--worker",
                               json.dumps(order._asdict())], capture_output=True, text=True)
        result = json.loads(answers.read().splitlines()[-1]).get("result", {}) if done.returncode == 0 else {}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
    found = {"summary": summary[-1] if summary else None, **result}
    if done.returncode or not summary:
        tail = (done.stdout + done.stderr).splitlines()[-40:]
        return {"failed": f"exit code {done.returncode}", **found, "output": "\n".join(tail)}
    return found


def probe(settings: Settings) -> list[Item]:
    """One item: the kernels alone on the small cases of an operation, one dtype each."""
    return [Item("probe", partial(_probe, settings))]


def _probe(settings: Settings) -> dict[str, Any]:
    from megalm.tools import kernel_cases
    from megalm.tools.kernel_cases.accuracy import outputs

    use_kernels(settings)
    module = next(module for module in kernel_cases.MODULES if _op_of(module) == settings.op)
    for case in module.small()[:2] if settings.dry_run else module.small():
        grads = None if case.grads is None else case.grads()
        outputs(partial(case.run, backend="megalm"), case.inputs(), case.dtypes[0], settings.device, grads)
    return {}


ITEMS = {"machine": machine, "build": build, "cases": cases, "bench": bench, "train": train, "sanitize": sanitize, "probe": probe}
