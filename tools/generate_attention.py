"""Write the attention kernels' instances, one file per head dim and direction, so that they compile in parallel.

    python -m megalm.tools.generate_attention          # after a change of the table below

The dims stand in csrc/attention_instances.h too; a test holds the files to this table.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megalm.tools.build_kernels import CSRC


@dataclass(frozen=True)
class Shape:
    """Tiles of one head dim: `sets` of 16 queries a warp and `keys` a tile forward; `tile` rows of the other side backward;
    `split`: the gradients of keys and values one after the other, where a thread's 255 registers don't hold both sums."""

    head_dim: int
    value_dim: int
    sets: int
    keys: int
    tile: int
    split: bool = False


SHAPES = (
    Shape(64, 64, sets=2, keys=64, tile=64),
    Shape(80, 80, sets=2, keys=64, tile=64),
    Shape(96, 96, sets=2, keys=64, tile=64),
    Shape(128, 128, sets=2, keys=64, tile=64),
    Shape(192, 128, sets=2, keys=64, tile=32),
    Shape(256, 256, sets=1, keys=64, tile=32, split=True),
)

_FILE = """// Made by tools/generate_attention.py.
#include "attention_{direction}.cuh"
#include "attention_instances.h"

int attention_{direction}_{d}_{e}(const megalm_attention_{direction}_params &params, megalm_stream stream) {{
  return params.dtype == MEGALM_BF16 ? attention::launch_{direction}<bf16, {d}, {e}, {rest}>(params, stream)
                                     : attention::launch_{direction}<f16, {d}, {e}, {rest}>(params, stream);
}}
"""


def files() -> dict[str, str]:
    """{name in csrc/: content} of every instance."""
    made = {}
    for shape in SHAPES:
        tiles = {"forward": f"{shape.sets}, {shape.keys}", "backward": f"{shape.tile}, {str(shape.split).lower()}"}
        for direction, rest in tiles.items():
            made[f"attention_{direction}_d{shape.head_dim}.cu"] = _FILE.format(direction=direction, d=shape.head_dim,
                                                                                e=shape.value_dim, rest=rest)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    if argv is None and len(sys.argv) > 1 or argv:
        print("generate_attention takes no arguments", file=sys.stderr)
        return 2
    for name, content in files().items():
        (CSRC / name).write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
