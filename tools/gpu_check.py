"""Everything that takes a GPU to show, in one command on a machine with one GPU; no installation is needed.

    python3 tools/gpu_check.py                       # all stages in 9 minutes; --minutes 30 looks longer
    python3 tools/gpu_check.py --stages cases bench
    python3 tools/gpu_check.py --dry-run             # every stage's code on a CPU, through the shim, tiny

Stages, most important first: build (for this GPU; and load), cases (every kernel against float64 on new random inputs, at
most twice torch's error, and twice the same bits; that torch's own attention keeps no scores), bench (tools/bench_ops.py), train
(steps of Llama-style models with each set of backends: speed, MFU, memory, and 20 losses side by side), sanitize
(compute-sanitizer on the small cases, where it is installed).

Each result is written as it comes, to benchmarks/gpu/<device>-<date>.json and a table beside it, so that a limit on time loses
nothing. A stage runs in processes of its own: one that crashes or hangs loses the one result that it was at.
"""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Make megalm, megalm.tools and megalm.launch those of this checkout: this file was started by its path."""
    sys.path[0] = str(ROOT)
    package = importlib.import_module("megalm")
    for name in ("tools", "launch"):
        spec = importlib.util.spec_from_file_location(f"megalm.{name}", ROOT / name / "__init__.py",
                                                      submodule_search_locations=[str(ROOT / name)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        setattr(package, name, module)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where something failed or a target was not met, 2 for a mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--worker"]:
        from megalm.tools.gpu.stages import work

        return work(arguments[1])
    from megalm.tools.gpu.supervise import main as supervise

    return supervise(arguments, __doc__)


if __name__ == "__main__":
    if not __package__:
        use_checkout()
    sys.exit(main())
