"""How many GPUs this process may use, counted without torch: a launcher that starts fresh processes never imports it."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")


def visible_gpus(environment: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> int:
    """The number of CUDA devices that a child process will see.

    None where torch was built without CUDA. CUDA_VISIBLE_DEVICES narrows what is there; as in CUDA, its list ends at the first
    entry that names no device ("-1", "").
    """
    present = _present(driver) if torch_has_cuda() else 0
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None or present == 0:
        return present
    count = 0
    for entry in (item.strip() for item in listed.split(",")):
        if not entry or (entry.lstrip("-").isdigit() and not 0 <= int(entry) < present):
            break
        count += 1
    return count


def torch_has_cuda() -> bool:
    """Was the installed torch built for CUDA? Its version file says so; importing it takes seconds."""
    torch = importlib.util.find_spec("torch")
    return torch is not None and runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] is not None


def _present(driver: Path) -> int:
    """All GPUs of this machine: from the kernel driver's own listing, else from nvidia-smi; 0 where there is neither."""
    if driver.is_dir():
        return sum(1 for _ in driver.iterdir())
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        output = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in output.splitlines())
