"""Which families there are, and from a config.json to the model section and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from megalm.checkpoint.foreign import Layout
from megalm.checkpoint.format import CheckpointError
from megalm.checkpoint.huggingface import gpt2, llama, neox
from megalm.config.schema import Model

MODULES: dict[str, ModuleType] = {**dict.fromkeys(llama.ARCHITECTURES, llama), "gpt2": gpt2, "gpt_neox": neox}
"""By model_type, in the order in which a family is looked for that a model fits."""
FREE = ("family", "vocab_size", "vocab_multiple", "dropout", "attention_dropout", "init_std")
"""Keys of the model section that change no weight and no logit: a run may have others than the weights come with."""
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
"""Ends of names of tensors that are no weights."""


def model_of(hf: Mapping[str, Any], source: str) -> Model:
    """The model section that a config.json means. Raises CheckpointError for one that megalm's model can't be."""
    family = hf.get("model_type")
    if family not in MODULES:
        raise CheckpointError(f"{source}: model_type {family!r} isn't supported; {', '.join(MODULES)} are")
    if hf.get("quantization_config"):
        raise CheckpointError(f"{source}: quantization_config: quantized weights aren't supported")
    try:
        return Model(**MODULES[family].section(hf))
    except KeyError as error:
        raise CheckpointError(f"{source}: {error.args[0]} is missing") from error
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (TypeError, ValueError) as error:  # pydantic's has a line a mistake
        raise CheckpointError(f"{source}: isn't a model: {' '.join(str(error).split())}") from error


def differences(ours: Model, theirs: Model, named: tuple[str, str]) -> list[str]:
    """The keys in which two model sections are different models, a line each with both sides' values."""
    free = FREE + (("seq_length",) if ours.position_embedding == "rotary" == theirs.position_embedding else ())
    here, there = (side.model_dump(mode="json") for side in (ours, theirs))
    return [f"model.{key}: {here[key]!r} {named[0]}, {there[key]!r} {named[1]}" for key in here
            if key not in free and here[key] != there[key]]


def family_of(model: Model, wanted: str | None) -> str:
    """The first family that can express the model, or the wanted one. Raises CheckpointError with what none, or it, can't."""
    if wanted is not None and wanted not in MODULES:
        raise CheckpointError(f"--family {wanted}: there are {', '.join(MODULES)}")
    found = {family: _unexpressed(family, model) for family in ([wanted] if wanted else MODULES)}
    for family, problems in found.items():
        if not problems:
            return family
    nearest = min(found, key=lambda family: len(found[family]))
    what = f"{wanted} can't be" if wanted else f"no family can be this model; {nearest} is near, but can't be"
    raise CheckpointError(f"{what} a model with " + "; ".join(found[nearest]))


def _unexpressed(family: str, model: Model) -> list[str]:
    written = config_json(family, model, model.vocab_size or 1)
    return differences(model, model_of(written, family), ("here", f"in {family}"))


def config_json(family: str, model: Model, vocab_size: int) -> dict[str, Any]:
    """The config.json of a model, without what its tokenizer and dtype add."""
    module = MODULES[family]
    architecture = module.ARCHITECTURE if hasattr(module, "ARCHITECTURE") else module.ARCHITECTURES[family]
    return {"architectures": [architecture], "model_type": family, "vocab_size": vocab_size,
            "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std, **module.config(family, model)}


def layouts(family: str, model: Model) -> Iterator[Layout]:
    """Every tensor of the model as the family names and arranges it."""
    return MODULES[family].layouts(model)


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is a constant that older files keep among the weights."""
    return name.endswith(BUFFERS)
