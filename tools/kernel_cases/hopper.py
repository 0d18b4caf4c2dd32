"""Attention by the path that a Hopper GPU takes: the cases of the portable one, and lengths for which its rings go round."""
from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from megalm.ops.kernels.attention import HEAD_DIMS
from megalm.tools.kernel_cases.attention import documents, fixed, packed, slopes, undropped
from megalm.tools.kernel_cases.attention import hopper as _case
from megalm.tools.kernel_cases.case import Case

_ordered = partial(_case, op="attention hopper in order", deterministic=True)


def small() -> list[Case]:
    bent = partial(_case, plain="reference")
    return [
        *undropped(_case, (63, 65, 17, 129, 33, 140), (17, 65)),
        # The gradient of a score that has no other beside it is 0 by a difference of two sums, whose rounding is not torch's.
        _case("s1", 1, 1, 1, 1, 1, backward=False),
        _case("s1 of many", 1, 65, 1, 1, 1),
        packed(64, nullcontext, "attention hopper"),
        _case("s520", 520, 520, 1, 1, 1),
        _case("s1023 of one head", 1023, 1023, 1, 1, 1),
        _case("s330 d128", 330, 330, 1, 2, 1, (128, 128)),
        _case("full s290 d128", 290, 400, 1, 1, 1, (128, 128), options=fixed(causal=False)),
        _case("documents d128", 200, 200, 1, 2, 1, (128, 128), options=partial(documents, [100, 64, 36])),
        _case("window d128", 260, 260, 1, 1, 1, (128, 128), options=fixed(window=(70, 0))),
        _ordered("s520", 520, 520, 1, 1, 1),
        _ordered("s330 d128", 330, 330, 1, 2, 1, (128, 128)),
        _ordered("full s290 d128", 290, 400, 1, 1, 1, (128, 128), options=fixed(causal=False)),
        _ordered("documents d128", 200, 200, 1, 2, 1, (128, 128), options=partial(documents, [100, 64, 36])),
        _ordered("window", 260, 260, 1, 2, 1, options=fixed(window=(70, 0))),
        _ordered("blocks of queries that see nothing", 400, 150, 1, 1, 1),
        bent("softcap and alibi d128", 150, 170, 1, 2, 1, (128, 128), options=lambda q: {"softcap": 2.0, **slopes(q)}),
    ]


def large() -> list[Case]:
    return [*(_case(f"d{d}/{e} s2048", 2048, 2048, 1, 8, 2, (d, e)) for d, e in HEAD_DIMS),
            _case("s1023", 1023, 1023, 2, 4, 4),
            _case("s1023 d128", 1023, 1023, 2, 4, 2, (128, 128)),
            _case("full s2048 d128", 2048, 2048, 1, 8, 8, (128, 128), options=fixed(causal=False)),
            _case("documents s2048 d128", 2048, 2048, 1, 4, 4, (128, 128), options=partial(documents, [700, 1, 1047, 300])),
            _case("window s2048 d128", 2048, 2048, 1, 8, 2, (128, 128), options=fixed(window=(500, 0))),
            *(_ordered(f"d{d} s2048", 2048, 2048, 1, 8, 2, (d, d)) for d in (64, 128)),
            _ordered("full s2048 d128", 2048, 2048, 1, 8, 8, (128, 128), options=fixed(causal=False)),
            _ordered("documents s2048 d128", 2048, 2048, 1, 4, 4, (128, 128), options=partial(documents, [700, 1, 1047, 300])),
            _ordered("window s2048 d128", 2048, 2048, 1, 8, 2, (128, 128), options=fixed(window=(500, 0)))]
