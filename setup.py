"""The package: megalm/, with launch/ as megalm.launch and tools/ as megalm.tools. Exact versions are in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megalm/__init__.py").read_text(encoding="utf-8")).group(1)

TESTS = ["pytest>=8", "transformers>=4.50", "tensorboard>=2.15", "wandb>=0.17", "ruff>=0.12"]

setup(
    name="megalm",
    version=VERSION,
    description="A 3D-parallel training stack for language models: tensor, pipeline and data parallelism from one JSON",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["megalm", "megalm.*"]), "megalm.launch", "megalm.tools", "megalm.tools.kernel_cases"],
    package_dir={"megalm.launch": "launch", "megalm.tools": "tools"},
    package_data={"": ["*.json"], "megalm.ops": ["lib/*"], "megalm.launch": ["*.example"]},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8",  # older ones scale a pipeline's gradients wrongly under accumulation
        "numpy>=1.26",
        "pydantic>=2.11",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={"logging": ["tensorboard>=2.15", "wandb>=0.17"], "tests": TESTS},
    entry_points={"console_scripts": ["megalm = megalm.cli:main"]},
)
