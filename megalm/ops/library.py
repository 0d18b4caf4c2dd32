"""The compiled kernels of csrc/, bound by ctypes and torch.library: building them needs no torch, and any torch can use them.

An operation of csrc takes one params struct whose fields stand by type: pointers, int64, float64, uint32, int32. Here it is an
`Operation` with the names of its fields, called with tensors and numbers; it launches on the current stream of the tensors'
device. On a CPU there is no library, unless a test has loaded the one made with the shim (csrc/README.md).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("lib")
FILE, ABOUT = "libmegalm.so", "libmegalm.json"
LEAST_CAPABILITY = (8, 0)
OTHER_SOURCES = "it was built from other sources; `make kernels` builds it"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""enum megalm_dtype of csrc/common/api.h; float64 is in the CPU's library only."""


class Library:
    """One shared library of csrc. Raises OSError where it can't be loaded."""

    def __init__(self, path: Path):
        self.path = path
        self._cdll = ctypes.CDLL(str(path))
        self._cdll.megalm_error.restype = ctypes.c_char_p
        self._entries: dict[str, Any] = {}

    def entry(self, name: str, struct: type[ctypes.Structure]) -> Any:
        """The function megalm_<name>. Raises RuntimeError if the library was made from other sources."""
        found = self._entries.get(name)
        if found is None:
            try:
                found, size = getattr(self._cdll, f"megalm_{name}"), getattr(self._cdll, f"megalm_{name}_size")
            except AttributeError as error:
                raise RuntimeError(f"{self.path} has no {name}: {OTHER_SOURCES}") from error
            size.restype = ctypes.c_int64
            if size() != ctypes.sizeof(struct):
                sizes = f"{size()} bytes of params, not {ctypes.sizeof(struct)}"
                raise RuntimeError(f"{self.path} has another {name} ({sizes}): {OTHER_SOURCES}")
            found.argtypes, found.restype = [ctypes.POINTER(struct), ctypes.c_void_p], ctypes.c_int
            self._entries[name] = found
        return found

    def count(self, name: str, params: ctypes.Structure) -> int:
        """What a function megalm_<name>(params) -> int64 returns."""
        function = getattr(self._cdll, f"megalm_{name}")
        function.restype = ctypes.c_int64
        return function(ctypes.byref(params))

    def error(self, code: int) -> str:
        return self._cdll.megalm_error(code).decode()

    def set_order(self, order: int) -> None:
        """The order of threads and blocks, in the CPU's library: 0 ascending, 1 descending, else the seed of a random one."""
        self._cdll.megalm_shim_order(ctypes.c_uint(order))


_shims: list[Library] = []


def use_shim(path: Path) -> Library:
    """Serve tensors on the CPU by the library made with the shim, for tests: it is thousands of times slower than a GPU."""
    _shims[:] = [Library(path)]
    return _shims[0]


def drop_shim() -> None:
    """Undo use_shim."""
    _shims.clear()


@lru_cache(maxsize=1)
def _cuda() -> Library | str:
    """The library for GPUs, or why there is none."""
    path = FOLDER / FILE
    if not path.exists():
        return "the kernels of csrc are not built; `make kernels` builds them"
    try:
        return Library(path)
    except OSError as error:
        return f"{path} can't be loaded: {error}"


def missing(device: str) -> str | None:
    """None where the kernels can run on this device type, or the reason why not."""
    if device == "cpu":
        return None if _shims else "its kernels run on a GPU"
    if device != "cuda":
        return f"its kernels run on NVIDIA GPUs, not on {device}"
    if isinstance(_cuda(), str):
        return _cuda()
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"its kernels need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or newer"
    return None


def about() -> dict[str, Any] | None:
    """What tools/build_kernels.py noted of the library for GPUs: targets, compiler, resources; None where it isn't built."""
    path = FOLDER / ABOUT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def library_for(device: torch.device) -> Library:
    """The library that serves tensors of a device. Raises RuntimeError, with the reason, where none does."""
    reason = missing(device.type)
    if reason is not None:
        raise RuntimeError(f"megalm's kernels can't take tensors on {device.type}: {reason}")
    library = _shims[0] if device.type == "cpu" else _cuda()
    assert isinstance(library, Library)
    return library


_FIELDS = (("pointers", ctypes.c_void_p), ("int64", ctypes.c_int64), ("float64", ctypes.c_double), ("uint32", ctypes.c_uint32),
           ("int32", ctypes.c_int32))


class Operation:
    """megalm_<name> of csrc, by the names of its params in their order, apart by type.

    A call gives every field by name: a tensor or None for a pointer, a number for the others.
    """

    def __init__(self, name: str, *, pointers: str, int64: str = "", float64: str = "", uint32: str = "", int32: str = "dtype"):
        self.name = name
        named = {"pointers": pointers, "int64": int64, "float64": float64, "uint32": uint32, "int32": int32}
        fields = [(field, kind) for group, kind in _FIELDS for field in named[group].split()]
        self.struct: type[ctypes.Structure] = type(f"{name}_params", (ctypes.Structure,), {"_fields_": fields})
        self.pointers = tuple(pointers.split())
        self.names = frozenset(field for field, _ in fields)

    def params(self, **values: Any) -> ctypes.Structure:
        """The filled struct. It holds addresses only: the tensors must outlive it."""
        assert values.keys() == self.names, values.keys() ^ self.names
        for name in self.pointers:
            tensor = values[name]
            values[name] = None if tensor is None else tensor.data_ptr()
        return self.struct(**values)

    def count(self, suffix: str, device: torch.device, **values: Any) -> int:
        """What megalm_<name>_<suffix> says of such params."""
        library = library_for(device)
        library.entry(self.name, self.struct)  # which compares the sizes: a library of other sources must not read the struct
        with _on(device):
            return library.count(f"{self.name}_{suffix}", self.params(**values))

    def __call__(self, device: torch.device, **values: Any) -> None:
        """Launch on the device's current stream. Raises RuntimeError with CUDA's words where that fails."""
        library = library_for(device)
        function = library.entry(self.name, self.struct)
        params = self.params(**values)
        with _on(device):
            stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
            code = function(ctypes.byref(params), stream)
        if code:
            raise RuntimeError(f"megalm {self.name}: {library.error(code)}")


class _Here:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_HERE = _Here()


def _on(device: torch.device) -> Any:
    """A context in which `device` is the current one; on one GPU, where it always is, it costs nothing."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_torch_library = torch.library.Library("megalm", "FRAGMENT")


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Register torch.ops.megalm.<name> and return it. `fake` gives torch.compile empty results of the right shapes and dtypes."""
    name = schema.split("(", 1)[0]
    _torch_library.define(schema)
    _torch_library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megalm::{name}", fake, lib=_torch_library)
    return getattr(torch.ops.megalm, name).default


def dtype_code(tensor: Tensor) -> int:
    """The kernels' number of a dtype. Raises ValueError for one that they don't have."""
    code = DTYPES.get(tensor.dtype)
    if code is None or (code == DTYPES[torch.float64] and tensor.device.type != "cpu"):
        raise ValueError(f"megalm's kernels take float32, float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}")
    return code


def check_dtypes(first: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless every tensor given has the dtype and device of the first."""
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != first.dtype or tensor.device != first.device):
            must = f"{first.dtype} on {first.device} as its input is"
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; it must be {must}")


def two_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, inner, outer_stride, inner_stride): rows of the last dim as csrc/common/rows.cuh addresses them.

    Row r is at (r / inner) * outer_stride + (r % inner) * inner_stride. A tensor of other strides is copied once.
    """
    if x.dim() > 1 and x.numel() and x.stride(-1) == 1:
        dims = _merged(x.shape[:-1], x.stride()[:-1])
        if len(dims) <= 2:
            (_, outer), (inner, inner_stride) = dims if len(dims) == 2 else (dims[0], (1, 0))
            return x, inner, outer, inner_stride
    x = x.contiguous()
    return x, 1, x.shape[-1], 0


def _merged(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dims that address the same elements in the same order."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size > 1:
            dims.append((size, stride))
    return dims or [(1, 0)]
