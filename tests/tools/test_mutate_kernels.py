"""Planted bugs: each has its place in the sources, a caught and a survived one are told apart. All of them: the tool, by hand."""

from __future__ import annotations

import shutil

import pytest

from megalm.tools import mutate_kernels
from megalm.tools.kernel_mutations import MUTATIONS, Mutation
from megalm.tools.mutate_kernels import main, mutated, verdict


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.op}: {mutation.name}")
def test_every_bug_has_its_place(mutation, tmp_path):
    copy = mutated(mutation, tmp_path)
    assert mutation.new in (copy / mutation.file).read_text()


def test_there_are_enough_of_them():
    assert len(MUTATIONS) >= 25 and len({(m.op, m.name) for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_bug_is_caught_and_a_comment_survives(monkeypatch):
    bug = Mutation("norm rms_norm 7x33", "no eps", "norm_forward.cu", "squares) * scale + eps", "squares) * scale * 2")
    assert "norm rms_norm 7x33" in verdict(bug).by
    harmless = Mutation("norm rms_norm 7x33", "nothing", "norm_forward.cu", "// A block a row of any length: what",
                        "// A block per row of any length: what")
    assert verdict(harmless).by is None


def test_mistakes_are_one_line(capsys, tmp_path):
    assert main(["--only", "no_such"]) == 2
    assert "no mutation of an operation 'no_such'; there are: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="stands 0 times in norm_forward.cu, not once"):
        mutated(Mutation("norm", "x", "norm_forward.cu", "no such text", ""), tmp_path)
    assert mutate_kernels.main(["--list", "--only", "norm"]) == 0
