"""The Transformer as a list of layer descriptions: what each layer is, whoever runs it and wherever it ends up."""

from megalm.model.build import choose_kernels
from megalm.model.description import LayerDescription
from megalm.model.gpt import layers

__all__ = ["LayerDescription", "choose_kernels", "layers"]
