"""Who may import whom, how long a file and a function may be, and where the environment may be read.

The table below is the design: an import points only down. Every rule is a function of (module name, source), and the
second half of this file shows that each function catches what it is there for.
"""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCE_SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp", ".sh"}
SOURCE_FOLDERS = ("megalm", "launch", "tools", "csrc", "tests", "benchmarks", "examples")

# A component may import the components named here and itself. `megalm` is the package's own __init__ (the version).
MAY_IMPORT: dict[str, set[str]] = {
    "megalm": set(),
    "config": set(),
    "ops": set(),
    "plan": {"config"},
    "parallel": {"config", "ops", "plan"},
    "data": {"config", "ops", "plan", "parallel"},
    "metrics": {"config", "ops", "plan", "parallel"},
    "optim": {"config", "ops", "plan", "parallel"},
    "model": {"config", "ops", "plan", "parallel", "data", "metrics", "optim"},
    "checkpoint": {"config", "ops", "plan", "parallel", "data", "metrics", "optim"},
    "engine": {"config", "ops", "plan", "parallel", "data", "metrics", "optim", "model", "checkpoint"},
}
MAY_IMPORT["train"] = set(MAY_IMPORT) - {"megalm"}
MAY_IMPORT["launch"] = MAY_IMPORT["train"] | {"train"}
MAY_IMPORT["tools"] = MAY_IMPORT["train"] | {"train"}
MAY_IMPORT["cli"] = MAY_IMPORT["train"] | {"train", "launch", "tools"}

# Packages from outside that a component must not touch; `deepspeed` has one door.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "megalm": ("torch", "numpy", "pydantic"),
    "config": ("torch", "numpy"),
    "plan": ("torch", "numpy", "pydantic"),
    "ops": ("torch.distributed",),
    "cli": ("torch", "numpy", "pydantic"),
}
FORBIDDEN_MODULES: dict[str, tuple[str, ...]] = {
    "megalm.data.tokenizer": ("torch",),
    "megalm.tools.plan": ("torch", "numpy"),
}
DEEPSPEED_DOOR = "engine"
ENVIRONMENT_READERS = ("megalm.launch", "megalm.parallel.world")


def module_name(path: Path) -> str:
    """The import name of a file below the repository root; launch/ and tools/ are installed as megalm.launch and megalm.tools."""
    parts = list(path.with_suffix("").parts)
    if parts[0] in ("launch", "tools"):
        parts.insert(0, "megalm")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def component(module: str) -> str:
    """megalm.plan.batch -> plan; megalm itself -> megalm."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports(module: str, source: str, is_package: bool = False) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in the source, relative ones resolved, importlib.import_module("...") included."""
    found: list[tuple[int, str]] = []
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join(base + ([node.module] if node.module else []))
            found += [(node.lineno, f"{name}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def upward_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    """Violations of the table: an import of a component that stands higher, beside, or outside what this one may use."""
    own = component(module)
    if own not in MAY_IMPORT:
        return [f"{module}: {own!r} has no place in the table of tests/test_structure.py"]
    problems = []
    for line, name in imports(module, source, is_package):
        if within(name, "megalm") and name not in ("megalm", "megalm.__version__"):
            other = component(name)
            if other != own and other not in MAY_IMPORT[own]:
                problems.append(f"{module}:{line}: {own} imports {name}")
        elif within(name, "deepspeed") and own != DEEPSPEED_DOOR:
            problems.append(f"{module}:{line}: {own} imports {name}; only {DEEPSPEED_DOOR} does")
        for package in FORBIDDEN.get(own, ()) + FORBIDDEN_MODULES.get(module, ()):
            if within(name, package):
                problems.append(f"{module}:{line}: {own} imports {name}")
    return problems


def forbidden_attributes(module: str, source: str) -> list[str]:
    """ops compute on one rank: `torch.distributed` isn't reached through an attribute either."""
    if component(module) != "ops":
        return []
    return [f"{module}:{node.lineno}: torch.distributed" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"]


def long_functions(module: str, source: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                problems.append(f"{module}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    return problems


def global_statements(module: str, source: str) -> list[str]:
    return [f"{module}:{node.lineno}: global {', '.join(node.names)}" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Global)]


def environment_reads(module: str, source: str) -> list[str]:
    """Uses of os.environ, os.getenv and their like, under whatever name `os` was imported."""
    if any(within(module, reader) for reader in ENVIRONMENT_READERS):
        return []
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    tree = ast.parse(source)
    aliases = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names if alias.name in ("os", "posix")}
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            problems += [f"{module}:{node.lineno}: from os import {alias.name}" for alias in node.names if alias.name in names]
        elif isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", None) in aliases:
            problems.append(f"{module}:{node.lineno}: os.{node.attr}")
    return problems


def source_files(suffixes: set[str]) -> list[Path]:
    """Paths relative to the root; a folder that isn't there yet has no files."""
    found = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path.relative_to(ROOT) for path in found + list(ROOT.glob("*.py")) if "__pycache__" not in path.parts)


def package_sources() -> list[tuple[str, str, bool]]:
    """(module, source, is a package) of everything that is installed: megalm/, launch/ and tools/."""
    paths = [path for path in source_files({".py"}) if path.parts[0] in ("megalm", "launch", "tools")]
    return [(module_name(path), (ROOT / path).read_text(), path.name == "__init__.py") for path in paths]


# The rules, held by the tree as it stands.

def test_imports_point_only_down():
    sources = package_sources()
    assert sources, "no sources found: the test looks in the wrong place"
    assert [problem for source in sources for problem in upward_imports(*source)] == []


@pytest.mark.parametrize("rule", [forbidden_attributes, long_functions, global_statements, environment_reads])
def test_rules_on_the_package(rule):
    assert [problem for module, source, _ in package_sources() for problem in rule(module, source)] == []


def test_functions_of_the_tests_are_short():
    paths = [path for path in source_files({".py"}) if path.parts[0] in ("tests", "benchmarks", "examples", "setup.py")]
    assert [problem for path in paths for problem in long_functions(str(path), (ROOT / path).read_text())] == []


def test_files_are_short():
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in source_files(SOURCE_SUFFIXES)}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_tests_mirror_the_package():
    """tests/<folder>/ exists only where megalm/<folder>/, launch/, tools/ or csrc/ does; parity spans them all."""
    mirrored = {path.name for path in (ROOT / "megalm").iterdir() if path.is_dir()} | {"launch", "tools", "csrc", "parity"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - mirrored == set()


# The rules catch what they are there for.

@pytest.mark.parametrize("module, source", [
    ("megalm.plan.batch", "import torch"),
    ("megalm.plan.batch", "from megalm.ops import norm"),
    ("megalm.plan.batch", "import pydantic"),
    ("megalm.config.schema", "from megalm.plan import make_plan"),
    ("megalm.config.load", "from ..plan import make_plan"),
    ("megalm.ops.norm", "import torch.distributed as dist"),
    ("megalm.ops.norm", "from torch import distributed"),
    ("megalm.parallel.linear", "from megalm.model import gpt"),
    ("megalm.data.loader", "from megalm.metrics import Logger"),
    ("megalm.model.gpt", "from megalm.checkpoint import save"),
    ("megalm.checkpoint.save", "import megalm.model.gpt"),
    ("megalm.checkpoint.save", "def f():\n    from megalm.engine import build"),
    ("megalm.model.gpt", "import deepspeed"),
    ("megalm.train", "from deepspeed.pipe import PipelineModule"),
    ("megalm.engine.engine", "from megalm import train"),
    ("megalm.train", "from megalm.launch import run"),
    ("megalm.tools.plan", "from megalm.launch.run import main"),
    ("megalm.tools.plan", "import numpy"),
    ("megalm.data.tokenizer", "import torch"),
    ("megalm.data.indexed", "import importlib\nimportlib.import_module('megalm.train')"),
    ("megalm.surprise.thing", ""),
    ("megalm.cli", "def main():\n    import torch"),
])
def test_upward_import_is_caught(module, source):
    assert len(upward_imports(module, source)) == 1


@pytest.mark.parametrize("module, source, is_package", [
    ("megalm.plan.batch", "import math\nfrom megalm.config import Config\nfrom . import topology", False),
    ("megalm.plan", "from .plan import make_plan\nfrom ..config import Config", True),
    ("megalm.engine.pipeline", "import deepspeed\nfrom megalm.model import layers", False),
    ("megalm.cli", "def main():\n    from megalm.launch import run", False),
    ("megalm.ops.norm", "import torch", False),
    ("megalm.metrics.logger", "from megalm import __version__", False),
])
def test_downward_import_is_allowed(module, source, is_package):
    assert upward_imports(module, source, is_package) == []


def test_relative_imports_are_resolved():
    assert imports("megalm.plan.batch", "from . import topology") == [(1, "megalm.plan.topology")]
    assert imports("megalm.plan", "from .batch import f", is_package=True) == [(1, "megalm.plan.batch.f")]
    assert imports("megalm.plan.batch", "from ..config.load import load") == [(1, "megalm.config.load.load")]


def test_installed_names():
    assert module_name(Path("tools/plan.py")) == "megalm.tools.plan"
    assert module_name(Path("megalm/plan/__init__.py")) == "megalm.plan"


def test_attribute_of_torch_is_caught():
    source = "import torch\ntorch.distributed.all_reduce(x)"
    assert len(forbidden_attributes("megalm.ops.norm", source)) == 1
    assert forbidden_attributes("megalm.parallel.linear", source) == []


def test_long_function_is_caught():
    def body(lines):
        return "class A:\n    def f(self):\n" + "        x = 1\n" * lines
    assert len(long_functions("m", body(MAX_FUNCTION_LINES))) == 1
    assert long_functions("m", body(MAX_FUNCTION_LINES - 1)) == []


def test_global_is_caught():
    assert len(global_statements("m", "x = 1\ndef f():\n    global x\n    x = 2")) == 1
    assert global_statements("m", "x = 1\ndef f():\n    def g():\n        nonlocal_x = x") == []


@pytest.mark.parametrize("source", [
    "import os\nos.environ['A']", "import os\nos.getenv('A')", "import os as o\no.environ.get('A')", "from os import environ",
    "from os import getenv as g",
])
def test_environment_read_is_caught(source):
    assert len(environment_reads("megalm.engine.engine", source)) == 1
    assert environment_reads("megalm.parallel.world", source) == []
    assert environment_reads("megalm.launch.run", source) == []


def test_other_uses_of_os_are_allowed():
    assert environment_reads("megalm.data.indexed", "import os\nos.fsync(3)\nself.environ['A']") == []
