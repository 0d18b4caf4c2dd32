"""The package: megalm/, with launch/ as megalm.launch and tools/ as megalm.tools. Exact versions are in constraints.txt.

The kernels of csrc/ are compiled into it where nvcc is (csrc/README.md). The environment decides:

    MEGALM_BUILD_CUDA     1: without the kernels the build fails; 0: they are left out; unset: tried where nvcc is
    MEGALM_CUDA_TARGETS   sm_80, sm_90a, sm_100a or some of them, apart by commas or spaces; default: all
    CUDA_HOME             where to look for bin/nvcc first; then PATH, then /usr/local/cuda
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megalm/__init__.py").read_text(encoding="utf-8")).group(1)
LIBRARY_FOLDER = "megalm/ops/lib"


def _build_kernels():
    """tools/build_kernels.py as a module: it needs nothing but the standard library."""
    spec = importlib.util.spec_from_file_location("build_kernels", HERE / "tools/build_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _say(line: str) -> None:
    print(f"megalm: {line}", flush=True)


class BuildPy(build_py):
    """The Python files, and the library of kernels: into the wheel, or in place for an editable install."""

    def run(self):
        super().run()
        kernels = _build_kernels()
        wish = os.environ.get("MEGALM_BUILD_CUDA", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"MEGALM_BUILD_CUDA is {wish!r}; it can be 1 (build the kernels), 0 (leave them out) or unset")
        folder = HERE / LIBRARY_FOLDER if self.editable_mode else Path(self.build_lib) / LIBRARY_FOLDER
        reason = "MEGALM_BUILD_CUDA is 0" if wish == "0" else self._build(kernels, folder, required=wish == "1")
        if reason:
            _say(f"the CUDA kernels were not built: {reason}")
            if not self.editable_mode:  # where one that was built before stays
                kernels.leave_out(folder, reason)

    def _build(self, kernels, folder: Path, required: bool) -> str | None:
        """None, or why there are no kernels."""
        targets = re.findall(r"[^,;\s]+", os.environ.get("MEGALM_CUDA_TARGETS", "")) or list(kernels.TARGETS)
        wrong = sorted(set(targets) - set(kernels.TARGETS))
        if wrong:
            raise SystemExit(f"MEGALM_CUDA_TARGETS has {', '.join(wrong)}; there are {', '.join(kernels.TARGETS)}")
        try:
            kernels.build_cuda(folder, targets, kernels.find_nvcc(os.environ.get("CUDA_HOME")), report=_say)
        except kernels.BuildError as error:
            if required:
                raise SystemExit(f"MEGALM_BUILD_CUDA is 1 and the kernels can't be built: {error}") from None
            return kernels.first_line(error)
        return None


class BdistWheel(bdist_wheel):
    """py3-none-<platform> with the library inside, which needs no particular Python; py3-none-any without."""

    def run(self):
        if not self.skip_build:
            self.run_command("build")
        built = Path(self.get_finalized_command("build_py").build_lib) / LIBRARY_FOLDER
        self.root_is_pure = not list(built.glob("*.so"))
        self.distribution.has_ext_modules = lambda: not self.root_is_pure  # which is how `install` knows its place
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


# megalm preprocess: fast tokenization, .zst, .parquet, near-duplicates, languages
CORPUS = ["gigatoken>=0.10", "zstandard>=0.23", "pyarrow>=18", "rensa>=0.5", "py3langid>=0.3"]
# checkpoint.remote s3://...; of a release it wants fsspec's of the same name
S3 = ["s3fs>=2024.6"]
# moto without its extra [server], which brings what its other services need; an S3 server takes flask and flask-cors
TESTS = ["pytest>=8", "pytest-xdist>=3.6", "transformers>=4.50", "tensorboard>=2.15", "wandb>=0.17", "ruff>=0.12", *S3,
         "moto[s3]>=5.1", "flask>=3", "flask-cors>=5"]

setup(
    name="megalm",
    version=VERSION,
    description="A 3D-parallel training stack for language models: tensor, pipeline and data parallelism from one JSON",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["megalm", "megalm.*"]),
              *(f"megalm.{package}" for package in find_packages(include=["launch", "tools", "tools.*"]))],
    package_dir={"megalm.launch": "launch", "megalm.tools": "tools"},
    package_data={"": ["*.json"], "megalm.launch": ["*.example"]},
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8",  # older ones scale a pipeline's gradients wrongly under accumulation
        "numpy>=1.26",
        "pydantic>=2.11",
        "safetensors>=0.4.3",
        "xxhash>=3.5",
        "fsspec>=2024.6",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "orjson>=3.10",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={"logging": ["tensorboard>=2.15", "wandb>=0.17"], "corpus": CORPUS, "s3": S3, "tests": TESTS},
    entry_points={"console_scripts": ["megalm = megalm.cli:main"]},
)
