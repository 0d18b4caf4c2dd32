"""Counting GPUs without torch, on a pretended driver."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megalm.launch import gpus
from megalm.launch.gpus import visible_gpus


@pytest.fixture(autouse=True)
def built_for_cuda(monkeypatch):
    monkeypatch.setattr(gpus, "torch_has_cuda", lambda: True)


@pytest.fixture
def driver(tmp_path):
    for number in range(4):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("listed", "count"),
    [
        (None, 4),
        ("0,1", 2),
        ("3", 1),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),  # CUDA stops at the first that isn't there
        ("0,7,1", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1", 2),
    ],
)
def test_cuda_visible_devices_narrows(driver, listed, count):
    assert visible_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}, driver) == count


def test_a_torch_without_cuda_uses_none(driver, monkeypatch):
    monkeypatch.setattr(gpus, "torch_has_cuda", lambda: False)
    assert visible_gpus({}, driver) == 0


def test_what_torch_was_built_for_is_known_without_importing_it():
    program = "import sys; from megalm.launch.gpus import torch_has_cuda; print(torch_has_cuda(), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == [str(torch.version.cuda is not None), "False"], result.stderr


def test_without_a_driver_nvidia_smi_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    lines = ["#!/bin/sh", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'", "echo '  MIG 1g'", "echo 'GPU 1: NVIDIA H200 (UUID: GPU-1)'"]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    monkeypatch.setattr(gpus.shutil, "which", lambda _: str(program))
    assert visible_gpus({}, tmp_path / "absent") == 2
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus({}, tmp_path / "absent") == 0


def test_a_machine_without_any(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus.shutil, "which", lambda _: None)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path / "absent") == 0
