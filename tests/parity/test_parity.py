"""Parity is the proof: every layout and every axis trains like the plain PyTorch loop of reference.py."""

from __future__ import annotations

import pytest

from tests.parity.cases import CASES, Case
from tests.parity.check import problems_of


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case: Case) -> None:
    assert problems_of(case) == []
