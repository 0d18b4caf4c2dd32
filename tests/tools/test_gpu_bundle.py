"""The bundle for an offline GPU machine: versions that fit together, and what is wrong with one. Gathering needs the network."""

from __future__ import annotations

import zipfile

import pytest

from megalm.tools import gpu_bundle
from megalm.tools.gpu_bundle import BUILT, WHEELS, pinned, problems, requirements

DEEPSPEED = pinned(["deepspeed"])[0].replace("==", "-")
NATIVE = {"msgpack", "ninja", "psutil", "pydantic_core", "sentencepiece"}


def make(folder, name, version, tag=None, needs=(), size=0):
    """A wheel with nothing but metadata."""
    tag = tag or ("cp312-cp312-manylinux_2_17_x86_64" if name in NATIVE else "py3-none-any")
    path = folder / f"{name.replace('-', '_')}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr("filler", b"\0" * size)
    return path


NEEDS = {"deepspeed": ("pydantic>=2.0.0", "hjson", "torch", "numpy", "py-cpuinfo", 'sphinx ; extra == "docs"'),
         "pydantic": ("pydantic-core==2.50.4", "typing-extensions>=4.16.0", 'tzdata ; sys_platform == "win32"')}


@pytest.fixture
def folder(tmp_path):
    """A bundle with nothing wrong."""
    for line in pinned([*BUILT, *WHEELS]):
        name, _, version = line.partition("==")
        make(tmp_path, name, version, needs=NEEDS.get(name, ()))
    return tmp_path


def test_versions_are_those_of_the_constraints():
    lines = pinned([*BUILT, *WHEELS])
    assert lines[0].startswith("deepspeed==") and len(lines) == len(BUILT) + len(WHEELS)
    with pytest.raises(ValueError, match="constraints.txt has no left-pad"):
        pinned(["psutil", "left-pad"])


def test_a_whole_bundle_has_no_problem(folder):
    assert list(problems(folder, "3.12")) == []


@pytest.mark.parametrize("change, said", [
    (lambda folder: next(folder.glob("hjson*")).unlink(), ["no wheel of hjson", f"{DEEPSPEED}-py3-none-any.whl needs hjson"]),
    (lambda folder: make(folder, "einops", "0.1"), [f"two versions of einops: 0.1 and {pinned(['einops'])[0][8:]}"]),
    (lambda folder: make(folder, "left-pad", "1.0", needs=["right-pad>2"]), ["left_pad-1.0-py3-none-any.whl needs right-pad>2"]),
    (lambda folder: make(folder, "left-pad", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64"),
     ["left_pad-1.0-cp311-cp311-manylinux_2_17_x86_64.whl is for cp311-cp311, not Python 3.12"]),
    (lambda folder: make(folder, "left-pad", "1.0", tag="cp38-abi3-macosx_11_0_arm64"),
     ["left_pad-1.0-cp38-abi3-macosx_11_0_arm64.whl is for macosx_11_0_arm64, not Linux on x86-64"]),
])
def test_what_is_wrong_is_named(folder, change, said):
    change(folder)
    assert sorted(problems(folder, "3.12")) == sorted(said)


def test_a_version_that_does_not_fit_and_a_bundle_too_large(folder, monkeypatch):
    next(folder.glob("pydantic_core*")).unlink()
    make(folder, "pydantic_core", "2.49.0", size=1)
    monkeypatch.setattr(gpu_bundle, "MOST_BYTES", 1000)
    found = list(problems(folder, "3.12"))
    assert [line for line in found if line.startswith("pydantic-") and line.endswith("needs pydantic-core==2.50.4")]
    assert found[-1].endswith("MB, over 0")


def test_requirements_leave_extras_out(folder):
    assert requirements(next(folder.glob("deepspeed*"))) == list(NEEDS["deepspeed"][:-1])


def test_the_command_is_printed(folder, monkeypatch, capsys):
    monkeypatch.setattr(gpu_bundle, "gather", lambda folder, python: None)
    assert gpu_bundle.main(["--out", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"--target /tmp/megalm-site {folder}/*.whl && PYTHONPATH=/tmp/megalm-site python3 tools/gpu_check.py" in text
    next(folder.glob("hjson*")).unlink()
    assert gpu_bundle.main(["--out", str(folder)]) == 2 and "no wheel of hjson" in capsys.readouterr().err
