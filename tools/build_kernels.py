"""Build the kernels of csrc/: for GPUs with nvcc, and for a CPU with the shim that the tests use. Needs neither torch nor a GPU.

    python -m megalm.tools.build_kernels                 # into the package, for every target: what `make kernels` runs
    python -m megalm.tools.build_kernels --targets sm_90a --out /tmp/lib
    python -m megalm.tools.build_kernels --table         # also rewrites the table of registers and spills in csrc/README.md

setup.py uses the same functions. An object is compiled again only when its source, a header or a flag has changed.
"""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
CSRC, LIBRARY_FOLDER, CACHE = ROOT / "csrc", ROOT / "megalm/ops/lib", ROOT / "build/kernels"
FILE, ABOUT = "libmegalm.so", "libmegalm.json"  # as megalm/ops/library.py looks for them

# Machine code by architecture; the intermediate code of the oldest serves every newer GPU that has none of its own.
TARGETS = {
    "sm_80": "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "sm_90a": "-gencode=arch=compute_90a,code=sm_90a",
    "sm_100a": "-gencode=arch=compute_100a,code=sm_100a",
}
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=default", "-Xptxas=-v", "--expt-relaxed-constexpr"]
GXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-DMEGALM_SHIM", "-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-x", "c++"]
SANITIZE = ["-fsanitize=address", "-g1", "-O1"]  # -g1: lines, and a third less to compile
MANY = 4  # files of a build, from which on reading their common headers once is worth it
NO_NVCC = "no nvcc on PATH or under /usr/local/cuda"


class BuildError(ValueError):
    """A compiler is missing or failed; the text says which and what it printed."""


def sources() -> list[Path]:
    """The kernels, one .cu per operation and direction."""
    return sorted(CSRC.glob("*.cu"))


def headers() -> list[Path]:
    return sorted(path for pattern in ("*.h", "*.cuh") for path in CSRC.rglob(pattern))


def sources_digest() -> str:
    """Of all sources and headers: a library with another one was made from other sources."""
    return _digest((), [*sources(), *headers()])


def find_nvcc(cuda_home: str | None = None) -> str | None:
    """nvcc under `cuda_home`, on PATH, or where CUDA's installer puts it; None without one."""
    beside = [Path(home) / "bin/nvcc" for home in (cuda_home, "/usr/local/cuda") if home]
    return next((str(path) for path in beside[:-1] if path.exists()), None) or shutil.which("nvcc") or next(
        (str(path) for path in beside if path.exists()), None)


def build_cuda(folder: Path = LIBRARY_FOLDER, targets: Sequence[str] = tuple(TARGETS), nvcc: str | None = None,
               report: Callable[[str], None] = print) -> Path:
    """Compile every kernel for `targets` and link them into `folder`; returns the library. Raises BuildError."""
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise BuildError(f"{NO_NVCC}; the kernels for GPUs need CUDA's compiler, 12.8 or newer")
    if not sources():
        raise BuildError(f"no sources in {CSRC}: kernels are built in a checkout, or while the package is installed from one")
    wrong = [target for target in targets if target not in TARGETS]
    if wrong or not targets:
        raise BuildError(f"no target {', '.join(wrong) or 'given'}; there are {', '.join(TARGETS)}")
    start = time.monotonic()
    compiler = [nvcc, *NVCC_FLAGS, *(TARGETS[target] for target in targets), f"-I{CSRC}"]
    objects = _compile(compiler, sources(), _version(nvcc), report)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / FILE
    _link([nvcc, "-shared", "-cudart", "static", *map(str, objects)], library)
    resources = [entry for built in objects for entry in _resources(built.with_suffix(".log").read_text())]
    about = {"targets": list(targets), "nvcc": _version(nvcc), "sources": sources_digest(),
             "seconds": round(time.monotonic() - start), "resources": resources}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return library


def leave_out(folder: Path, reason: str) -> None:
    """Note in `folder` why it holds no library, for `megalm kernels` to say; an old one is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)
    (folder / ABOUT).write_text(json.dumps({"targets": [], "not_built": reason}) + "\n")


def first_line(error: BuildError) -> str:
    """An error in one line: what failed, and of a compiler's output the first line that says so."""
    head, *rest = str(error).splitlines()
    said = [line.strip() for line in rest if line.strip()]
    told = next((line for line in said if re.search("error|fatal", line, re.IGNORECASE)), said[0] if said else "")
    return f"{head} {told}".strip()


def build_shim(folder: Path, sanitize: bool = False, csrc: Path = CSRC, only: str = "",
               report: Callable[[str], None] = lambda line: None) -> Path:
    """Compile every kernel for the CPU with csrc/shim and link them into `folder`; returns the library. Raises BuildError.

    sanitize: with AddressSanitizer, whose runtime the loading process must have preloaded. csrc: another tree of the sources.
    only: operations whose name starts so, a library without the others.
    """
    if shutil.which("g++") is None:
        raise BuildError("no g++ on PATH")
    extra = SANITIZE if sanitize else []
    files = [*sorted({*csrc.glob(f"{only}*.cu"), csrc / "error.cu"}), *sorted((csrc / "shim").glob("*.cpp"))]
    objects = _compile(["g++", *GXX_FLAGS, *extra, f"-I{csrc}"], files, _version("g++"), report, begin="common/common.cuh")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libmegalm_shim.so"
    _link(["g++", "-shared", *extra, *map(str, objects)], library)
    return library


def sanitizer() -> list[str]:
    """What goes before a command that loads a sanitized library: the sanitizer must be there before the program is."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return ["env", f"LD_PRELOAD={runtime}", "ASAN_OPTIONS=detect_leaks=0"]


def _compile(compiler: Sequence[str], files: Sequence[Path], version: str, report: Callable[[str], None],
             begin: str = "") -> list[Path]:
    """Objects of the files, in the cache, a file a core at a time; what a compiler said of each is beside it as .log.

    begin: a header that every file includes, which g++ then reads once for all of them where they are many. Processes that want
    the same objects share the work.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    objects = {file: _object(compiler, file, version) for file in files}
    missing = [file for file in files if not objects[file].exists()]
    finished, speaking = count(len(files) - len(missing) + 1), Lock()

    def compile_one(source: Path) -> None:
        built = objects[source]
        with _locked(built.with_suffix(".lock")):
            if built.exists():  # another process made it meanwhile
                next(finished)
                return
            start, partial = time.monotonic(), built.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
            done = subprocess.run([*compiler, *first, "-c", str(source), "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"{source.name} does not compile:\n{done.stderr.strip()}")
            built.with_suffix(".log").write_text(done.stderr)
            partial.replace(built)
        with speaking:
            report(f"{next(finished)} of {len(files)}: compiled {source.name} in {time.monotonic() - start:.0f} s")

    missing.sort(key=lambda file: -file.stat().st_size)  # a long one that began last would be waited for
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        first = _precompiled(compiler, begin, Path(folder)) if begin and len(missing) >= MANY else []
        list(pool.map(compile_one, missing))
    return [objects[file] for file in files]


def _object(compiler: Sequence[str], source: Path, version: str) -> Path:
    """Where the source's object is kept. What is included counts, not where the tree lies: of a copy of it with one file changed
    that file alone is compiled."""
    root = source.parent if source.suffix == ".cu" else source.parents[1]
    flags = [word for word in compiler if not word.startswith("-I")]
    return CACHE / f"{source.stem}-{_digest([version, *flags], [source, *_included(source, root)])}.o"


def _precompiled(compiler: Sequence[str], begin: str, folder: Path) -> list[str]:
    """Flags by which g++ has read `begin` before a source; none where it can't be compiled, which the sources will show."""
    header = folder / "begin.h"
    header.write_text(f'#include "{begin}"\n')
    done = subprocess.run([*compiler, "-x", "c++-header", str(header), "-o", f"{header}.gch"], capture_output=True)
    return [] if done.returncode else ["-include", str(header)]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _included(source: Path, root: Path) -> list[Path]:
    """The headers that a source includes by name, directly or not."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        for name in re.findall(r'#include "([^"]+)"', waiting.pop().read_text()):
            path = root / name
            if path.exists() and path not in found:
                found[path] = None
                waiting.append(path)
    return sorted(found)


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _link(command: Sequence[str], library: Path) -> None:
    """Link to a temporary name first, so that a library that is in use or a failure leaves the old one whole."""
    partial = library.with_suffix(f".{os.getpid()}.partial")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{library.name} does not link:\n{done.stderr.strip()}")
    partial.replace(library)


def _version(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text) or re.search(r"(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else text.strip()


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)


def _resources(log: str) -> list[dict]:
    """What ptxas said of each kernel: name, target, registers a thread, bytes spilled a thread."""
    return [{"kernel": name, "target": target, "registers": int(registers), "spilled": int(spilled)}
            for name, target, spilled, registers in _ENTRY.findall(log)]


def kernel_name(mangled: str) -> str:
    """norm_forward of _ZN..12norm_forwardI..: the last name before a template's arguments (Itanium C++ ABI, section 5.1)."""
    rest, name = re.sub(r"^_ZN?", "", mangled), mangled
    while (length := re.match(r"(\d+)", rest)) is not None:
        size = int(length.group(1))
        name, rest = rest[length.end():length.end() + size], rest[length.end() + size:]
    return name


def table(resources: Sequence[dict]) -> str:
    """Registers and spills by kernel and target, the worst of its instances, as Markdown."""
    rows = ["| kernel | instances | " + " | ".join(TARGETS) + " |", "|---|--:|" + "--:|" * len(TARGETS)]
    names = sorted({kernel_name(entry["kernel"]) for entry in resources})
    for name in names:
        mine = [entry for entry in resources if kernel_name(entry["kernel"]) == name]
        cells = []
        for target in TARGETS:
            here = [entry for entry in mine if entry["target"] == target]
            cells.append(f"{max(e['registers'] for e in here)}, {max(e['spilled'] for e in here)}" if here else "")
        rows.append(f"| {name} | {len({entry['kernel'] for entry in mine})} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


BEGIN, END = "<!-- table: make kernels -->", "<!-- end of table -->"


def write_table(resources: Sequence[dict], readme: Path) -> None:
    """Put the table between its marks in a README."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(resources)}\n{END}{rest.split(END)[1]}")


def over_budget(resources: Sequence[dict], readme: Path = CSRC / "README.md") -> list[str]:
    """Kernels that spill more than the README allows: `N bytes` for each, and more for those in its table of exceptions."""
    text = readme.read_text()
    usual = int(re.search(r"<!-- spill budget: (\d+) bytes -->", text).group(1))
    allowed = {name: int(most) for name, most in re.findall(r"^\| `?(\w+)`? \| (\d+) bytes \|", text, re.MULTILINE)}
    problems = set()
    for entry in resources:
        name = kernel_name(entry["kernel"])
        most = allowed.get(name, usual)
        if entry["spilled"] > most:
            problems.add(f"{name} for {entry['target']} spills {entry['spilled']} bytes, not at most {most}")
    return sorted(problems)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="build_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="SM",
                        help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--out", type=Path, default=LIBRARY_FOLDER, help="the folder of the library; default: the package")
    parser.add_argument("--nvcc", help="the compiler; default: of PATH, else of /usr/local/cuda")
    parser.add_argument("--table", action="store_true", help="rewrite the table in csrc/README.md")
    arguments = parser.parse_args(argv)
    try:
        library = build_cuda(arguments.out, arguments.targets, arguments.nvcc, report=lambda line: print(line, flush=True))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = json.loads((library.parent / ABOUT).read_text())
    if arguments.table:
        write_table(about["resources"], CSRC / "README.md")
    for line in over_budget(about["resources"]) if (CSRC / "README.md").exists() else ():
        print(f"warning: {line}")
    print(f"{library.name} for {', '.join(about['targets'])} in {about['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
