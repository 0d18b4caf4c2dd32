"""The tensors of a folder in Hugging Face's arrangement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.foreign.pickles import load_pickle
from megalm.checkpoint.format import CheckpointError, inside, read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class TensorFiles:
    """The tensors of a folder in Hugging Face's arrangement: one file, or several and an index; safetensors, else .bin."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when there are no weights, or a file doesn't hold what the index says."""
        self.folder = folder
        self._files = self._find()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(set(self._files.values())):
            for tensor, shape in self._list(name).items():
                if self._files.get(tensor, name) == name:
                    self._files[tensor], self.shapes[tensor] = name, shape
        del self._files[""]
        missing = sorted(set(self._files) - set(self.shapes))
        if missing:
            raise CheckpointError(f"{folder}: {missing[0]} isn't in {self._files[missing[0]]}, where the index has it")

    def _find(self) -> dict[str, str]:
        """{tensor: file}; of a single file nothing is known yet but its name, under ""."""
        for name in WEIGHTS:
            if (self.folder / f"{name}.index.json").is_file():
                index = read_json(self.folder / f"{name}.index.json")
                files = index.get("weight_map") if isinstance(index, Mapping) else None
                if not isinstance(files, Mapping) or not files:
                    raise CheckpointError(f"{self.folder / name}.index.json: has no weight_map")
                for file in set(files.values()):
                    if not inside(self.folder, file).is_file():
                        raise CheckpointError(f"{self.folder}: {file} is missing, which the index names")
                return {**files, "": next(iter(files.values()))}
            if (self.folder / name).is_file():
                return {"": name}
        raise CheckpointError(f"{self.folder}: no weights here: neither {' nor '.join(WEIGHTS)}, nor an index of them")

    def _list(self, name: str) -> dict[str, tuple[int, ...]]:
        path = inside(self.folder, name)
        if path.suffix != ".safetensors":
            return {tensor: tuple(value.shape) for tensor, value in load_pickle(path).items() if isinstance(value, Tensor)}
        try:
            with safe_open(path, framework="pt") as file:
                return {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in list(file.keys())}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def open(self, tensor: str) -> Tensor:
        """A view of the mapped file, which is let go of with it."""
        path = self.folder / self._files[tensor]
        if path.suffix != ".safetensors":
            return load_pickle(path)[tensor]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(tensor)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {tensor}: {error}") from error
