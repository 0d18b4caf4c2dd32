"""Run the small cases against a library made with the shim; exits with 1 if one fails. A process of its own, so that a
preloaded AddressSanitizer or a planted bug that crashes stays there."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megalm.ops.library import use_shim
from megalm.tools.kernel_cases import small


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernel_cases", description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--order", type=int, nargs="+", default=[0], help="0: ascending, 1: descending, else a seed")
    parser.add_argument("--first-dtype", action="store_true", help="only the first dtype of each case")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--only", default="", help="cases whose name starts with this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny work: other threads would only be waited for
    library, failed, ran = use_shim(arguments.library), 0, 0
    for case in small():
        if not case.name.startswith(arguments.only):
            continue
        for order, dtype in case.runs(arguments.order, arguments.first_dtype):
            library.set_order(order)
            ran += 1
            try:
                case.check(dtype)
            except (AssertionError, RuntimeError) as problem:
                failed += 1
                print(f"FAILED {case.name}, order {order}: {str(problem).splitlines()[0]}", flush=True)
                if arguments.stop:
                    return 1
    print(f"{ran - failed} of {ran} cases passed")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
