"""README.md documents the format for other programs: its reader must read, and needs nothing but json and numpy."""
from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import xxhash

import megalm.checkpoint
from tests.checkpoint.fakes import SMALL, draw, engines, save_all
from tests.checkpoint.test_layouts import succeed

TEXT = (Path(megalm.checkpoint.__file__).parent / "README.md").read_text()


def test_the_reader_in_the_readme_reads(tmp_path):
    program = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    assert set(re.findall(r"import (.*)", program)) == {"json, pathlib, numpy"} and "megalm" not in program
    names: dict = {}
    exec(program, names)
    values = draw(SMALL)
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, values, tp=3, pp=2, dp=3)))[0]
    for role in ("master", "exp_avg"):
        parts = names["read"](folder, role)
        assert set(parts) == set(SMALL)
        assert all(torch.equal(torch.from_numpy(tensor), values[part, role]) for part, tensor in parts.items())


def test_every_key_is_documented_and_every_documented_key_is_there(tmp_path):
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, draw(SMALL))))[0]
    index = json.loads((folder / "rank_00000.json").read_text())
    for title, found in (("checkpoint.json", json.loads((folder / "checkpoint.json").read_text())),
                         ("rank_NNNNN.json", {**index, **index["fragments"][0]})):
        section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
        documented = {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
        assert documented == set(found)


def test_the_hashes_are_what_the_readme_says(tmp_path):
    """Computed from the page's words alone: blocks of a tensor, the header, the files, and what JSON files say of themselves."""
    folder = succeed(save_all(tmp_path, 1, engines({"big": ((1500, 1000), 0)}, draw({"big": ((1500, 1000), 0)}))))[0]
    index, content = json.loads((folder / "rank_00000.json").read_text()), (folder / "rank_00000.safetensors").read_bytes()
    assert xxhash.xxh3_64_hexdigest(content[: index["header_bytes"]]) == index["header_xxh3"]
    reached = index["header_bytes"]
    for fragment in index["fragments"]:
        assert fragment["offset"] == reached
        tensor = content[reached: reached + 4 * fragment["count"]]
        blocks = [tensor[start: start + index["block_bytes"]] for start in range(0, len(tensor), index["block_bytes"])]
        assert fragment["xxh3"] == [xxhash.xxh3_64_hexdigest(block) for block in blocks] and len(blocks) == 2
        reached += len(tensor)
    assert reached == len(content) == index["bytes"]
    manifest = json.loads((folder / "checkpoint.json").read_text())
    for name, stated in manifest["files"].items():
        bytes_ = (folder / name).read_bytes()
        assert stated == {"bytes": len(bytes_), **({"xxh3": xxhash.xxh3_64_hexdigest(bytes_)} if "xxh3" in stated else {})}
    for name, said in (("checkpoint.json", manifest["xxh3"]), ("rank_00000.json", index["xxh3"])):
        body, line = (folder / name).read_bytes().rsplit(b'  "xxh3"', 1)
        assert line.decode() == f': "{said}"\n}}\n' and xxhash.xxh3_64_hexdigest(body) == said
