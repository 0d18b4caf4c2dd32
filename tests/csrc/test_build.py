"""nvcc compiles every kernel, within the budget of spills, into a library that loads beside any torch; and setup.py does it, or
says in one line why not."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from megalm.ops import library
from megalm.ops.library import Operation
from megalm.ops.norm import norm
from megalm.ops.registry import REGISTRY
from megalm.tools import build_kernels
from megalm.tools.build_kernels import CSRC, FILE, NO_NVCC, ROOT, BuildError, build_cuda, find_nvcc, kernel_name
from tests.csrc.test_library import OPERATIONS

TARGET = "sm_90a"
README = (CSRC / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of a library for one target."""
    if find_nvcc() is None:
        pytest.skip(NO_NVCC)
    folder = tmp_path_factory.mktemp("cuda")
    build_cuda(folder, [TARGET])
    return folder


def about(folder: Path) -> dict:
    return json.loads((folder / build_kernels.ABOUT).read_text())


def test_spills_are_within_the_budget_of_the_readme(built):
    resources = about(built)["resources"]
    assert resources and {entry["target"] for entry in resources} == {TARGET}
    assert build_kernels.over_budget(resources) == []


def test_the_table_of_the_readme_has_every_kernel(built):
    rows = README.split(build_kernels.BEGIN)[1].split(build_kernels.END)[0]
    named = set(re.findall(r"^\| (\w+) \|", rows, re.MULTILINE)) - {"kernel"}
    assert named == {kernel_name(entry["kernel"]) for entry in about(built)["resources"]}, "`make kernels` writes the table"


def test_the_library_has_every_operation_and_says_that_it_needs_a_gpu(built, monkeypatch):
    loaded = library.Library(built / FILE)
    for name, operation in OPERATIONS.items():
        entry = loaded.entry(name, operation.struct)
        if not torch.cuda.is_available():
            code = entry(ctypes.byref(filled(operation)), None)
            assert code != 0 and "no error" not in loaded.error(code), name
    monkeypatch.setattr(library, "FOLDER", built)
    library._cuda.cache_clear()
    REGISTRY.chosen.clear()
    if not torch.cuda.is_available():
        assert library.missing("cuda") is None
        with pytest.raises(ValueError, match="its kernels run on a GPU"):
            norm(torch.ones(2, 8), torch.ones(8), None, 1e-5, kind="rms_norm", backend="megalm")
    monkeypatch.undo()
    library._cuda.cache_clear()


def filled(operation: Operation) -> ctypes.Structure:
    """Params that no operation takes for an empty call: every number is 1."""
    values = dict.fromkeys(operation.names, 1) | dict.fromkeys(operation.pointers)
    return operation.params(**values)


def test_what_the_compiler_said_is_read():
    log = ("ptxas info    : Compiling entry function '_ZN3foo9my_kernelIfLi4EEEvi' for 'sm_90a'\n"
           "ptxas info    : Function properties for _ZN3foo9my_kernelIfLi4EEEvi\n"
           "    8 bytes stack frame, 96 bytes spill stores, 24 bytes spill loads\n"
           "ptxas info    : Used 40 registers, used 1 barriers\n")
    found = build_kernels._resources(log)
    assert found == [{"kernel": "_ZN3foo9my_kernelIfLi4EEEvi", "target": "sm_90a", "registers": 40, "spilled": 96}]
    assert "| my_kernel | 1 |  | 40, 96 |  |" in build_kernels.table(found)
    assert build_kernels.over_budget(found) == ["my_kernel for sm_90a spills 96 bytes, not at most 64"]


def test_wrong_targets_are_named(tmp_path):
    with pytest.raises(BuildError, match="no target sm_99; there are sm_80, sm_90a, sm_100a"):
        build_cuda(tmp_path, ["sm_90a", "sm_99"], nvcc="/bin/true")


# setup.py, as pip runs it: in a copy of the sources in which no real nvcc is found.

SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt",
           "csrc", "megalm", "launch", "tools")
BROKEN_NVCC = "#!/bin/sh\necho noise >&2\necho 'norm.cu(7): error: planted' >&2\nexit 1\n"
WORKING_NVCC = """#!/bin/sh
case $1 in --version) echo "Cuda compilation tools, release 13.0, V13.0.99"; exit;; esac
while [ $# -gt 1 ]; do case $1 in -o) out=$2;; -gencode*) targets="$targets $1";; esac; shift; done
echo "$targets" > "$out"
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what the package is built from."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
        else:
            shutil.copy(ROOT / name, copy / name)
    build = copy / "tools/build_kernels.py"
    assert "/usr/local/cuda" in build.read_text()
    build.write_text(build.read_text().replace("/usr/local/cuda", str(tmp_path / "absent")))
    return copy


def nvcc(tree: Path, script: str) -> dict[str, str]:
    """An environment whose CUDA_HOME has this compiler."""
    path = tree.parent / "cuda/bin/nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return {"CUDA_HOME": str(tree.parent / "cuda")}


def run_in(tree: Path, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """(exit code, output) of python with these arguments; PATH has nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGALM_", "CUDA"))}
    done = subprocess.run([sys.executable, *command], cwd=tree, text=True, timeout=120, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**kept, "PATH": str(tree / "absent"), **environment})
    return done.returncode, done.stdout


def wheel(tree: Path, environment: dict[str, str], expect: int = 0) -> tuple[str, zipfile.ZipFile | None]:
    """(output, wheel) of the build that pip asks the backend for."""
    out = tree.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    hook = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    code, output = run_in(tree, ["-c", hook], environment)
    assert (code != 0) == (expect != 0), output
    made = list(out.glob("*.whl"))
    return output, zipfile.ZipFile(made[0]) if made else None


def ours(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("megalm: ")]


def test_without_a_compiler_one_line_says_so(tree):
    output, made = wheel(tree, {})
    assert ours(output) == [f"megalm: the CUDA kernels were not built: no nvcc on PATH or under {tree.parent / 'absent'}; "
                            "the kernels for GPUs need CUDA's compiler, 12.8 or newer"]
    assert made.filename.endswith("-py3-none-any.whl")
    assert not [name for name in made.namelist() if name.endswith(".so") or name.startswith("csrc/")]
    assert "no nvcc" in json.loads(made.read("megalm/ops/lib/libmegalm.json"))["not_built"]


def test_a_failing_compiler_is_one_line_or_an_error(tree):
    output, made = wheel(tree, nvcc(tree, BROKEN_NVCC))
    said, = ours(output)
    assert re.fullmatch(r"megalm: the CUDA kernels were not built: \w+\.cu does not compile: norm\.cu\(7\): error: planted", said)
    assert made.filename.endswith("-py3-none-any.whl")
    output, made = wheel(tree, {**nvcc(tree, BROKEN_NVCC), "MEGALM_BUILD_CUDA": "1"}, expect=1)
    assert "MEGALM_BUILD_CUDA is 1 and the kernels can't be built: " in output and "planted" in output and made is None
    assert "no nvcc" in wheel(tree, {"MEGALM_BUILD_CUDA": "1"}, expect=1)[0]


def test_a_working_compiler_makes_a_wheel_for_the_platform(tree):
    output, made = wheel(tree, {**nvcc(tree, WORKING_NVCC), "MEGALM_CUDA_TARGETS": "sm_80, sm_90a"})
    assert made.filename.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    assert "Root-Is-Purelib: false" in made.read(next(n for n in made.namelist() if n.endswith("/WHEEL"))).decode()
    assert json.loads(made.read("megalm/ops/lib/libmegalm.json"))["targets"] == ["sm_80", "sm_90a"]
    assert "megalm/ops/lib/libmegalm.so" in made.namelist() and "megalm/__init__.py" in made.namelist()
    assert len(ours(output)) == len(list(CSRC.glob("*.cu")))
    # What an earlier build left is not taken along.
    output, made = wheel(tree, {**nvcc(tree, WORKING_NVCC), "MEGALM_BUILD_CUDA": "0"})
    assert ours(output) == ["megalm: the CUDA kernels were not built: MEGALM_BUILD_CUDA is 0"]
    assert made.filename.endswith("-py3-none-any.whl") and "megalm/ops/lib/libmegalm.so" not in made.namelist()


def test_wrong_settings_are_errors(tree):
    assert "MEGALM_BUILD_CUDA is 'yes'; it can be 1" in wheel(tree, {"MEGALM_BUILD_CUDA": "yes"}, expect=1)[0]
    assert "MEGALM_CUDA_TARGETS has sm_75; there are" in wheel(tree, {"MEGALM_CUDA_TARGETS": "sm_75"}, expect=1)[0]


def test_an_sdist_can_be_built_from(tree):
    code, output = run_in(tree, ["-c", "from setuptools import build_meta; build_meta.build_sdist('..')"], {})
    assert code == 0, output
    archive, = tree.parent.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(path.relative_to(ROOT)) for path in [*build_kernels.sources(), *build_kernels.headers()]} <= names
    assert {"setup.py", "pyproject.toml", "tools/build_kernels.py", "launch/run.py", "csrc/README.md"} <= names


def test_pip_installs_without_a_compiler(tree, tmp_path):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    code, output = run_in(tree, ["-m", "pip", "install", "-v", ".", *options], {})
    assert code == 0 and "megalm: the CUDA kernels were not built: no nvcc" in output, output
    code, output = run_in(tmp_path / "site", ["-c", "from megalm import cli; cli.main(['kernels'])"], {})
    assert code == 0 and "(when the package was installed: no nvcc" in output, output
