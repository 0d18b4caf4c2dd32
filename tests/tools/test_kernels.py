"""`megalm kernels`: what is built, what each operation would take on this machine and on a GPU, and why not the others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megalm.ops import library
from megalm.ops.registry import Registry
from megalm.tools import kernels
from megalm.tools._ops import registered
from megalm.tools.build_kernels import leave_out, sources_digest


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder in place of the one of the library."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library._cuda.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    library._cuda.cache_clear()


def test_every_operation_is_there_with_its_choice(no_gpu, capsys):
    assert kernels.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == "cpu" and facts["gpu"] is None
    found = {(mine["operation"], mine["with"]): mine for mine in facts["operations"]}
    assert {operation for operation, _ in found} == set(registered().backends)
    norm = found["norm", ""]
    assert (norm["backend"], norm["dtypes"], norm["measured_on"]) == ("torch", ["bfloat16", "float32"], "cpu")
    assert norm["others"]["megalm"] == "its kernels run on a GPU" and norm["others"]["reference"] == "behind torch in the order"
    assert found["attention", "dropout"]["backend"] == "reference"
    assert "depends on the layout" in found["attention", "dropout"]["others"]["torch"]


def test_text_for_a_machine_without_gpu_or_library(no_gpu, folder, capsys):
    leave_out(folder, "no nvcc on PATH")
    assert kernels.main([]) == 0
    text = capsys.readouterr().out
    assert "the kernels of csrc are not built; `make kernels` builds them" in text
    assert "(when the package was installed: no nvcc on PATH)" in text
    assert "no GPU, which megalm kernels need" in text
    assert "not megalm: its kernels run on a GPU" in text
    assert kernels.main(["--device", "cuda"]) == 0
    text = capsys.readouterr().out
    assert "for a GPU that was not measured" in text and "not megalm: the kernels of csrc are not built" in text


@pytest.mark.parametrize("sources, said", [("other", True), (None, True), (sources_digest(), False)])
def test_a_library_of_other_sources_is_named(no_gpu, folder, capsys, sources, said):
    resources = [{"kernel": f"_ZN3foo4norm{kind}", "target": "sm_80", "registers": 1, "spilled": 0} for kind in ("IfEE", "IdEE")]
    about = {"targets": ["sm_80"], "nvcc": "13.0.88", "sources": sources, "resources": resources}
    (folder / library.ABOUT).write_text(json.dumps(about))
    kernels.main([])
    text = capsys.readouterr().out
    assert "sm_80; nvcc 13.0.88; 1 kernels" in text
    assert ("made from other sources than csrc/" in text) == said


def test_dtypes_that_differ_stand_apart():
    table = {"norm": ["fast", "plain"], "backends": {"norm": {"fast": {"cannot": {"float32": "it is for bf16"}}, "plain": {}}}}
    registry = Registry(table)
    registry.register("norm", fast=len, plain=abs)
    half, full = kernels.operations(registry, "cpu")
    assert (half["dtypes"], half["backend"], half["others"]) == (["bfloat16"], "fast", {"plain": "behind fast in the order"})
    assert (full["dtypes"], full["backend"], full["others"]) == (["float32"], "plain", {"fast": "it is for bf16"})
    assert half["measured_on"] is None and kernels.traits(table, "norm") == []


def test_help_imports_nothing_heavy():
    code = ("import sys; from megalm.tools.kernels import main; code = main(['--help']); "
            "print(code, sorted({'torch', 'numpy', 'pydantic', 'deepspeed'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
