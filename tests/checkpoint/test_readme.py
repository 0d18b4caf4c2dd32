"""README.md documents the format for other programs: its reader must read."""
from __future__ import annotations

import re
from pathlib import Path

import torch

import megalm.checkpoint
from tests.checkpoint.fakes import SMALL, draw, engines, save_all
from tests.checkpoint.test_layouts import succeed

TEXT = (Path(megalm.checkpoint.__file__).parent / "README.md").read_text()


def test_the_reader_in_the_readme_reads(tmp_path):
    program = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    names: dict = {}
    exec(program, names)
    values = draw(SMALL)
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, values, tp=3, pp=2, dp=3)))[0]
    for role in ("master", "exp_avg"):
        parts = names["read"](folder, role)
        assert set(parts) == set(SMALL)
        assert all(torch.equal(tensor, values[part, role]) for part, tensor in parts.items())
