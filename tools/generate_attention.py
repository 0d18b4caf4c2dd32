"""Write the attention kernels' instances, one file per head dim, direction and path, so that they compile in parallel.

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
    """Tiles of one head dim.

    The portable path: `sets` of 16 queries a warp and `keys` a tile forward; `tile` rows of the other side backward; `split`: the
    gradients of keys and values one after the other, where a thread's 255 registers don't hold both sums.
    Hopper's: `consumers` warpgroups of 64 queries and `hopper_keys` a tile forward; `queries` a tile backward, None: no kernel;
    `fp8`: whether there is one, forward, of bytes, which has 128 keys a tile.
    """

    head_dim: int
    value_dim: int
    sets: int
    keys: int
    tile: int
    split: bool = False
    consumers: int = 2
    hopper_keys: int = 128
    queries: int | None = None
    fp8: bool = False


SHAPES = (
    Shape(64, 64, sets=2, keys=64, tile=64, consumers=3, queries=128, fp8=True),
    Shape(80, 80, sets=2, keys=64, tile=64),
    Shape(96, 96, sets=2, keys=64, tile=64),
    Shape(128, 128, sets=2, keys=64, tile=64, queries=64, fp8=True),
    Shape(192, 128, sets=2, keys=64, tile=32),
    Shape(256, 256, sets=1, keys=64, tile=32, split=True, hopper_keys=64, fp8=True),
)

_FILE = """// Made by tools/generate_attention.py.
#include "attention_{name}.cuh"
#include "attention_instances.h"

int attention_{name}_{d}_{e}(const megalm_attention_{direction}_params &params, megalm_stream stream) {{
  return params.dtype == MEGALM_BF16 ? attention::launch_{name}<bf16, {rest}>(params, stream)
                                     : attention::launch_{name}<f16, {rest}>(params, stream);
}}
"""
_WORKSPACE = """
int64_t attention_hopper_workspace_{d}_{e}(const megalm_attention_backward_params &params) {{
  return attention::Sums::make(params, {queries}).bytes();
}}
"""


def files() -> dict[str, str]:
    """{name in csrc/: content} of every instance."""
    made = {}
    for shape in SHAPES:
        d, e = shape.head_dim, shape.value_dim
        rest = {"forward": f"{d}, {e}, {shape.sets}, {shape.keys}",
                "backward": f"{d}, {e}, {shape.tile}, {str(shape.split).lower()}",
                "hopper_forward": f"{d}, {e}, {shape.consumers}, {shape.hopper_keys}"}
        if shape.queries is not None:
            rest["hopper_backward"] = f"{d}, {shape.queries}"
        if shape.fp8:
            rest["hopper_fp8"] = f"{d}, {e}, 2, 128"
        for name, arguments in rest.items():
            text = _FILE.format(name=name, direction="backward" if "backward" in name else "forward", d=d, e=e, rest=arguments)
            if name == "hopper_backward":
                text += _WORKSPACE.format(d=d, e=e, queries=shape.queries)
            made[f"attention_{name}_d{d}.cu"] = text
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
