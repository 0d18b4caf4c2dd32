"""Is there room for copies of all of a machine's ranks, within the limits of control groups of either version?"""
from __future__ import annotations

import pytest

from megalm.checkpoint.memory import available_bytes, shortage


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(str(content))


@pytest.mark.parametrize("line, free", [("0::/job/step", 300 + 50), ("5:memory:/old", 200), ("0::/free", 1024 * 1000)])
def test_the_nearest_limit_counts(line, free, tmp_path):
    write(tmp_path / "proc", meminfo="MemTotal: 5000 kB\nMemAvailable: 1000 kB\n")
    write(tmp_path / "proc/self", cgroup=f"1:cpu:/x\n{line}\n")
    groups = tmp_path / "groups"
    write(groups / "job/step", memory__max="max", memory__current=1, memory__stat="")
    write(groups / "job", memory__max=1000, memory__current=700, memory__stat="active_file 9\ninactive_file 50\n")
    write(groups / "free", memory__max="max")
    write(groups / "memory/old", memory__limit_in_bytes=900, memory__usage_in_bytes=700, memory__stat="")
    write(groups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=700, memory__stat="")
    assert available_bytes(tmp_path / "proc", groups) == free
    assert available_bytes(tmp_path / "nowhere", groups) is None


def test_all_ranks_of_a_machine_decide_alike():
    told = [("a", 30, 100), ("a", 30, 130), ("b", 30, 100), ("c", 900, None)]
    assert [shortage(name, told) for name in "abc"] == [(60, 100), None, None]
