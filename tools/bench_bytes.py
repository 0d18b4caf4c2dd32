"""Of each operation that tools/bench_ops.py times, the bytes of a phase: what must be read and written once."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def all_of_it(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """Forward: inputs and results. Backward: the results' gradients, the inputs, and the inputs' gradients."""
    leaves = [tensor for tensor in inputs if tensor.is_floating_point()]
    return size(*inputs, *results), size(*results) + size(*leaves) + size(*leaves)


def norm_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """With a residual, backward reads the sum instead of both inputs, and one gradient is that of both."""
    vectors = [tensor for tensor in inputs if tensor.dim() == 1]
    row = results[0]
    return size(*inputs, *results), size(*results) + 2 * size(row) + size(vectors[0]) + size(*vectors)


def rotary_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """Backward turns the gradient by the tables: the input itself isn't needed."""
    tables = [tensor for tensor in inputs[1:] if tensor.dim() == 2]
    return size(*inputs, *results), 2 * size(*results) + size(*tables)


def causal_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """What no query sees need not be read, but its zeros must be written."""
    seen = size(*results) * (results[0].shape[-2] + 1) / 2 / results[0].shape[-1]
    return seen + size(*results), 2 * seen + size(*results)


def softmax_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """Backward reads the probabilities and their gradient: a mask shows in the probabilities."""
    return size(*inputs, *results), 3 * size(*results)


def dropout_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float, float]:
    """The mask is drawn again, and the gradient of a residual is the result's own."""
    vectors = [tensor for tensor in inputs if tensor.dim() == 1 and tensor.is_floating_point()]
    return size(*inputs, *results), 2 * size(*results) + size(*vectors)


def loss_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float]:
    """Three passes over the logits: read for the statistics, read and written for the gradient in their place."""
    return (3 * size(inputs[0]),)


def in_place_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float]:
    """Query and key are read and written, by the tables; the value is left alone."""
    return (2 * size(*results[:2]) + size(*inputs[1:]),)


def read_once(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float]:
    """The whole cache, for few queries."""
    return (size(*inputs, *results),)


def adam_bytes(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[float]:
    """Weight, gradient and both moments are read, all but the gradient written: 28 bytes a parameter in fp32."""
    return (7 * size(*inputs),)


BYTES = {"norm": norm_bytes, "rotary": rotary_bytes, "softmax": softmax_bytes, "dropout": dropout_bytes}
