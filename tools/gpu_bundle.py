"""Wheels of what an offline GPU machine lacks for tools/gpu_check.py, in one folder: DeepSpeed and what it needs.

    python -m megalm.tools.gpu_bundle                 # what `make gpu-bundle` runs; needs pip and the package index
    python -m megalm.tools.gpu_bundle --python 3.11   # default: 3.12

The machine has Linux on x86-64, that Python, torch for its GPU, transformers, and nvcc. Versions are those of constraints.txt.
"""
from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from email.parser import Parser as Headers
from pathlib import Path

from megalm.tools._command import Parser, run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/gpu-bundle"  # which git ignores
MOST_BYTES = 60 * 10**6

BUILT = ("deepspeed", "hjson")  # which come as source; pure Python once DeepSpeed's own operations are left out
WHEELS = ("annotated-types", "einops", "msgpack", "ninja", "psutil", "py-cpuinfo", "pydantic", "pydantic_core", "sentencepiece",
          "typing-inspection", "typing_extensions")
# torch and transformers bring these, in versions that fit them.
THERE = ("filelock", "fsspec", "huggingface-hub", "jinja2", "networkx", "numpy", "packaging", "pyyaml", "regex", "safetensors",
         "setuptools", "sympy", "tokenizers", "torch", "tqdm", "transformers", "triton")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(names: Sequence[str], constraints: Path = ROOT / "constraints.txt") -> list[str]:
    """name==version of each, as constraints.txt has them. Raises ValueError for one that it hasn't."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    versions = {canonical(name): version for name, version in lines}
    missing = [name for name in names if canonical(name) not in versions]
    if missing:
        raise ValueError(f"constraints.txt has no {', '.join(missing)}")
    return [f"{name}=={versions[canonical(name)]}" for name in names]


def gather(folder: Path, python: str) -> None:
    """Fill the folder with wheels. Raises ValueError with pip's words where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    with tempfile.TemporaryDirectory() as made:
        # --no-build-isolation: DeepSpeed's setup asks for the torch that is here.
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made, *pinned(BUILT))
        for wheel in Path(made).glob("*.whl"):
            (folder / wheel.name).write_bytes(wheel.read_bytes())
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    _pip("download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms,
         "--dest", str(folder), *pinned(WHEELS))


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run(["env", "DS_BUILD_OPS=0", sys.executable, "-m", "pip", command, "--quiet", *arguments],
                          capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip {command}: {done.stderr.strip()}")


def problems(folder: Path, python: str) -> Iterator[str]:
    """What is wrong with a bundle: a wheel for another machine, a requirement that nothing meets, two of one name, too large."""
    wheels = sorted(folder.glob("*.whl"))
    held: dict[str, str] = {}
    for wheel in wheels:
        name, version, *_, tag, abi, platform = wheel.stem.split("-")
        if canonical(name) in held:
            yield f"two versions of {name}: {held[canonical(name)]} and {version}"
        held[canonical(name)] = version
        own = f"cp{python.replace('.', '')}"
        stable = abi == "abi3" and re.fullmatch(r"cp3\d+", tag) and int(tag[3:]) <= int(python.split(".")[1])
        if not (own in tag.split(".") or stable or "py3" in tag.split(".")):
            yield f"{wheel.name} is for {tag}-{abi}, not Python {python}"
        if platform != "any" and not platform.endswith("x86_64"):
            yield f"{wheel.name} is for {platform}, not Linux on x86-64"
    yield from (f"no wheel of {name}" for name in (*BUILT, *WHEELS) if canonical(name) not in held)
    for wheel in wheels:
        yield from (f"{wheel.name} needs {need}" for need in requirements(wheel) if not _met(need, held))
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > MOST_BYTES:
        yield f"{size / 1e6:.1f} MB, over {MOST_BYTES / 1e6:.0f}"


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs without extras, as its metadata says."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Headers().parsestr(archive.read(name).decode("utf-8")).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line]


def _met(need: str, held: dict[str, str]) -> bool:
    from packaging.requirements import Requirement

    wanted = Requirement(need)
    name = canonical(wanted.name)
    if wanted.marker is not None and not wanted.marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"}):
        return True
    return name in THERE if name not in held else wanted.specifier.contains(held[name], prereleases=True)


def bundle(arguments: argparse.Namespace) -> int:
    """The program, after its arguments."""
    gather(arguments.out, arguments.python)
    found = list(problems(arguments.out, arguments.python))
    if found:
        raise ValueError("; ".join(found))
    wheels = list(arguments.out.glob("*.whl"))
    folder = arguments.out.relative_to(ROOT) if arguments.out.is_relative_to(ROOT) else arguments.out
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.1f} MB, in {folder}. On the GPU machine, in a copy of this checkout that has them:\n\n"
          f"{instructions(folder)}")
    return 0


def instructions(folder: Path) -> str:
    """The one command to run there."""
    site = "/tmp/megalm-site"
    return (f"python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target {site} {folder}/*.whl && "
            f"PYTHONPATH={site} python3 tools/gpu_check.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(prog="gpu_bundle", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="the machine's Python; default: 3.12")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder; default: build/gpu-bundle")
    return run(parser, bundle, argv)


if __name__ == "__main__":
    sys.exit(main())
