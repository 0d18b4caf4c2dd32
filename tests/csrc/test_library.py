"""The binding: params as the C headers have them, and a clear line where the library is missing, old or can't serve."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import re
import shutil
import subprocess

import pytest
import torch

from megalm.ops import kernels, library
from megalm.ops.library import Operation
from megalm.ops.norm import norm
from megalm.tools.build_kernels import CSRC, build_shim


def operations() -> list[Operation]:
    """Every operation that is bound anywhere in megalm.ops.kernels."""
    modules = [importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Operation)]


OPERATIONS = {operation.name: operation for operation in operations()}


def test_every_operation_of_the_headers_is_bound():
    declared = {name for header in CSRC.glob("*.h") for name in re.findall(r"MEGALM_OPERATION\((\w+)\)", header.read_text())}
    assert set(OPERATIONS) == declared


def test_params_stand_where_the_headers_put_them(tmp_path):
    """The offset of every field of every struct, as g++ sees the header."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    lines = [f'#include "{header.name}"' for header in sorted(CSRC.glob("*.h"))]
    lines += ["#include <cstddef>", "#include <cstdio>", "int main() {"]
    for name, operation in OPERATIONS.items():
        lines += [f'std::printf("{name}.{field} %zu\\n", offsetof(megalm_{name}_params, {field}));'
                  for field, _ in operation.struct._fields_]
        lines.append(f'std::printf("{name} %zu\\n", sizeof(megalm_{name}_params));')
    source = tmp_path / "offsets.cpp"
    source.write_text("\n".join([*lines, "}"]))
    subprocess.run(["g++", f"-I{CSRC}", str(source), "-o", str(tmp_path / "offsets")], check=True)
    printed = subprocess.run([str(tmp_path / "offsets")], capture_output=True, text=True, check=True).stdout
    expected = dict(line.split() for line in printed.splitlines())
    found = {}
    for name, operation in OPERATIONS.items():
        found |= {f"{name}.{field}": str(getattr(operation.struct, field).offset) for field, _ in operation.struct._fields_}
        found[name] = str(ctypes.sizeof(operation.struct))
    assert found == expected


def test_without_a_library_the_kernels_say_what_they_need():
    with pytest.raises(ValueError, match=r"'megalm', which can't serve cpu float32 rms_norm: its kernels run on a GPU"):
        norm(torch.ones(2, 8), torch.ones(8), None, 1e-5, kind="rms_norm", backend="megalm")
    with pytest.raises(RuntimeError, match="can't take tensors on cpu: its kernels run on a GPU"):
        torch.ops.megalm.norm_forward(torch.ones(2, 8), None, torch.ones(8), None, 1e-5, False)
    assert "NVIDIA GPUs, not on mps" in library.missing("mps")


def test_a_library_that_is_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library._cuda.cache_clear()
    assert library.missing("cuda") == "the kernels of csrc are not built; `make kernels` builds them"
    (tmp_path / library.FILE).write_bytes(b"not a library")
    library._cuda.cache_clear()
    assert "can't be loaded" in library.missing("cuda")
    monkeypatch.undo()
    library._cuda.cache_clear()


def test_a_library_of_other_sources_is_named(shim):
    other = Operation("norm_forward", pointers="x")
    with pytest.raises(RuntimeError, match=r"has another norm_forward \(\d+ bytes of params, not 16\): .* `make kernels`"):
        library.Library(shim.path).entry("norm_forward", other.struct)
    with pytest.raises(RuntimeError, match="has no no_such_thing"):
        shim.entry("no_such_thing", other.struct)


def test_an_error_of_a_launch_is_raised(shim):
    params = dict.fromkeys(OPERATIONS["norm_forward"].names, 0)
    params |= dict.fromkeys(OPERATIONS["norm_forward"].pointers) | {"rows": 1, "width": 0}
    with pytest.raises(RuntimeError, match="megalm norm_forward: invalid argument"):
        OPERATIONS["norm_forward"](torch.device("cpu"), **params)


PLANTED = {
    "a barrier that some threads never reach": ("if (threadIdx.x < 16) __syncthreads(); else __syncwarp();", "deadlock"),
    "a shuffle that names a lane that left": ("if (threadIdx.x == 3) return; __shfl_xor_sync(~0u, 1.0f, 1);", "left or never"),
    "lanes that disagree": ("__shfl_xor_sync(threadIdx.x % 2 ? 0xffffu : ~0u, 1.0f, 1);", "disagree"),
    "a lane outside its own mask": ("__shfl_xor_sync(1u, 1.0f, 1);", "does not name the calling lane"),
    "a block of 2048 threads": (None, "invalid launch configuration"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_shim_catches(what, build_with_shim, tmp_path):
    """What hangs or is undefined on a GPU is an error with its block here."""
    body, message = PLANTED[what]
    source = f"""#include "common/common.cuh"
        #include <cstdio>
        __global__ void kernel() {{ {body or ""} }}
        int main() {{
          const auto it = kernel;
          MEGALM_LAUNCH(it, dim3(2), dim3({32 if body else 2048}), 0, (megalm_stream) nullptr);
          std::puts(cudaGetErrorString(cudaGetLastError()));
        }}"""
    file = tmp_path / "planted.cpp"
    file.write_text(source)
    build_with_shim(file, tmp_path / "planted")
    assert message in subprocess.run([str(tmp_path / "planted")], capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_source_that_does_not_compile_is_one_error(tmp_path, monkeypatch):
    broken = tmp_path / "csrc"
    shutil.copytree(CSRC, broken)
    (broken / "error.cu").write_text("int f( {")
    with pytest.raises(ValueError, match=r"error.cu does not compile:\n.*error"):
        build_shim(tmp_path / "out", csrc=broken)
