"""Weights from one format to another, a few rows at a time: megalm's checkpoints, Hugging Face folders, others' to read.

megalm convert --from hf:PATH --to DIR          a checkpoint, for generate, init_from and convert
megalm convert --from RUN --to hf:DIR           config.json, safetensors and the tokenizer's files
megalm convert --from megatron:PATH --config JSON --to DIR or hf:DIR; neox:PATH alike: they don't say what model they are
megalm convert --print-config hf:PATH           the model section that its weights ask for
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalm.checkpoint import CheckpointError, find, read_weights
from megalm.checkpoint.foreign import sources
from megalm.checkpoint.format import TOKENIZER, read_json
from megalm.checkpoint.huggingface import differences, family_of, open_huggingface
from megalm.checkpoint.huggingface.families import config_json, model_of
from megalm.checkpoint.huggingface.read import CONFIG, read_config, run_config
from megalm.checkpoint.huggingface.tokenizer import tokenizer_config, tokenizer_doubt
from megalm.checkpoint.huggingface.write import write_huggingface
from megalm.checkpoint.stream import Reader, write_weights
from megalm.config import load
from megalm.config.schema import Model
from megalm.data import DataError, load_tokenizer
from megalm.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from megalm.plan import make_plan
from megalm.tools._command import Parser, run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORIGIN = "huggingface"
"""Folder of a checkpoint with the config.json and other files of the folder that it was made of."""
TOKENIZER_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
"""What Hugging Face's libraries call a tokenizer's file."""
SETTINGS = "tokenizer_config.json"


class Opened(NamedTuple):
    """Weights to convert: what model they are, the dtype they were trained or published in, and the files beside them."""

    model: Model
    weights: Reader
    dtype: str
    origin: dict[str, Path]        # files of a Hugging Face folder by name, config.json among them
    tokenizer: dict[str, Any]      # the tokenizer section, its path that of a file here


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 with one line a mistake."""
    parser = Parser(prog="megalm convert", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--from", dest="source", metavar="WEIGHTS",
                        help="hf:, megatron: or neox:PATH, a run's folder, or one checkpoint in it")
    parser.add_argument("--to", dest="target", metavar="FOLDER", help="hf:PATH, or a folder for a checkpoint; it must be new")
    parser.add_argument("--print-config", metavar="hf:PATH", help="print the model section instead")
    parser.add_argument("--config", metavar="JSON", help="a config with the model and tokenizer of megatron: and neox: weights")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; default: as they were trained or published")
    parser.add_argument("--family", help="the Hugging Face model_type; default: the first that can express the model")
    parser.add_argument("--ema", action="store_true", help="of a run, the moving average of the weights (optimizer.ema_decay)")
    parser.add_argument("--like", metavar="hf:PATH",
                        help="take config.json, where it is the same model, and tokenizer files from this folder")
    return run(parser, _convert, argv)


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        print(json.dumps({"model": sources.describe(arguments.print_config)}, indent=2))
        return 0
    if not arguments.source or not arguments.target:
        raise ValueError("--from and --to are needed, or --print-config (--help lists the options)")
    if sources.kind_of(arguments.source)[0] in sources.OPENERS:
        opened = _open_described(arguments.source, arguments.config)
    else:
        opened = _open(arguments.source, arguments.ema)
    kind, path = sources.kind_of(arguments.target)
    if kind not in (None, "hf"):
        raise ValueError(f"--to {arguments.target}: megalm writes its own checkpoints and hf: folders")
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    if kind == "hf":
        _to_huggingface(Path(path), opened, dtype, arguments)
    else:
        _to_checkpoint(Path(path), opened, dtype)
    return 0


def _open(spec: str, ema: bool) -> Opened:
    kind, path = sources.kind_of(spec)
    if kind == "hf":
        found = open_huggingface(path)
        files = {file.name: file for file in found.beside}
        dtype = found.weights.dtype("embedding.word.weight")
        return Opened(found.model, found.weights, NAMES.get(dtype, "fp32"), files, _tokenizer_of(files))
    folder = find(path)
    config = load(folder / "config.json")
    section = config.tokenizer.model_dump(mode="json")
    if section["path"]:
        section["path"] = str(folder / TOKENIZER / Path(section["path"]).name)
    vocab_size = read_json(folder / "plan.json").get("vocab_size")
    origin = {file.name: file for file in sorted((folder / ORIGIN).glob("*"))}
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return Opened(model, read_weights(folder, ema), config.precision.dtype, origin, section)


def _open_described(spec: str, config_path: str | None) -> Opened:
    """Weights of a format that doesn't say what model they are: the config does."""
    if config_path is None:
        raise ValueError(f"--from {spec}: --config is needed, whose model section says what model it is")
    config = load(config_path)
    vocab_size = config.model.vocab_size or load_tokenizer(config.tokenizer).vocab_size
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    weights = sources.open_for(spec, model, vocab_size)
    dtype = NAMES.get(weights.dtype("embedding.word.weight"), "fp32")
    return Opened(model, weights, dtype, {}, config.tokenizer.model_dump(mode="json"))


def _tokenizer_of(files: Mapping[str, Path]) -> dict[str, Any]:
    """The tokenizer section that a Hugging Face folder means: tokenizer.json, else a sentencepiece model, tokenizer.model or the
    only one of another name; else bytes stand in."""
    if TOKENIZER_FILES["huggingface"] in files:
        path = files[TOKENIZER_FILES["huggingface"]]
        return {"type": "huggingface", "path": str(path), "eod": _end_of_text(files, path)}
    models, usual = sorted(name for name in files if name.endswith(".model")), TOKENIZER_FILES["sentencepiece"]
    if not models:
        return {"type": "bytes", "path": None, "eod": None}
    if len(models) > 1 and usual not in models:
        raise CheckpointError(f"{files[models[0]].parent}: which of {', '.join(models)} is the tokenizer? Name it {usual}")
    section = {"type": "sentencepiece", "path": str(files[usual if usual in models else models[0]]), "eod": _end_of_text(files)}
    own = load_tokenizer(argparse.Namespace(**section | {"eod": None})).eod
    try:
        if load_tokenizer(argparse.Namespace(**section)).eod != own:
            return section
    except DataError:  # no piece of the model
        pass
    return section | {"eod": None}  # the model names an end of its own


def _end_of_text(files: Mapping[str, Path], tokenizer: Path | None = None) -> str | None:
    """The eos_token of tokenizer_config.json, else what config.json's eos_token_id is in the tokenizer.json."""
    settings = read_json(files[SETTINGS]) if SETTINGS in files else {}
    eos = settings.get("eos_token") if isinstance(settings, Mapping) else None
    if eos is not None:
        return eos.get("content") if isinstance(eos, Mapping) else eos
    number = read_json(files[CONFIG]).get("eos_token_id") if CONFIG in files else None
    if tokenizer is None or not isinstance(number, int):
        return None
    return HuggingFaceTokenizer(tokenizer).token(number)


def _to_checkpoint(folder: Path, opened: Opened, dtype: torch.dtype | None) -> None:
    name = NAMES[dtype] if dtype else opened.dtype
    section, files = dict(opened.tokenizer), {}
    if section["path"]:
        source = Path(section["path"])
        files[f"{TOKENIZER}/{source.name}"] = source
        section["path"] = source.name
    files |= {f"{ORIGIN}/{name}": path for name, path in opened.origin.items()}
    padded = opened.weights.shape("embedding.word.weight")[0] != opened.model.vocab_size
    config = run_config(opened.model, name, section, str(folder), opened.model.vocab_multiple if padded else 1)
    documents = {"config.json": config.model_dump(mode="json"), "plan.json": make_plan(config, 1).to_dict()}
    write_weights(folder, opened.weights, documents, files, dtype)
    print(f"{folder}: {len(list(opened.weights))} parts; {_told(section, opened.model.vocab_size)}")


def _to_huggingface(folder: Path, opened: Opened, dtype: torch.dtype | None, arguments: argparse.Namespace) -> None:
    like = sources.kind_of(arguments.like or "")
    if arguments.like and like[0] != "hf":
        raise ValueError(f"--like {arguments.like}: hf:PATH expected")
    origin = {path.name: path for path in _beside(Path(like[1]))} if arguments.like else opened.origin
    config = _original_config(origin, opened.model, arguments)
    family = config["model_type"] if config else family_of(opened.model, arguments.family)
    stored = {opened.weights.dtype(part) for part in opened.weights}
    # The fp32 masters of a bf16 run become what it computed with; weights that were stored as they are stay so.
    dtype = dtype or (DTYPES[opened.dtype] if stored == {torch.float32} else None)
    files = {name: path for name, path in origin.items() if name != CONFIG}
    if not config:
        config = config_json(family, opened.model, opened.model.vocab_size) | _end_of_document(opened.tokenizer)
    section, theirs, documents, doubt = opened.tokenizer, _tokenizer_of(files), {}, None
    if section["path"] and theirs["path"] is None:
        files[TOKENIZER_FILES[section["type"]]] = Path(section["path"])
        tokenizer = load_tokenizer(argparse.Namespace(**section))
        documents[SETTINGS] = tokenizer_config(tokenizer, opened.model.seq_length)
        doubt = tokenizer_doubt(tokenizer, family)
        files.pop(SETTINGS, None)
    named = {key: NAMES.get(dtype or next(iter(stored)), "fp32") for key in ("dtype", "torch_dtype")}
    words = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    config = {key: value for key, value in config.items() if key not in named} | {"torch_dtype": words[named["dtype"]]}
    write_huggingface(folder, family, opened.model, opened.weights, config, files, documents=documents, dtype=dtype)
    written = {str(path): name for name, path in files.items()}.get(_tokenizer_of(files)["path"])
    told = _told({"path": written}, opened.model.vocab_size)
    print(f"{folder}: {config['architectures'][0]}, {words[named['dtype']]}; {told}{f'; {doubt}' if doubt else ''}")


def _told(section: Mapping[str, Any], vocab_size: int) -> str:
    """What is said of a tokenizer. A model of other tokens that comes without one speaks bytes, which mean nothing to it."""
    if section["path"]:
        return f"the tokenizer is {Path(section['path']).name}"
    if vocab_size == BytesTokenizer.vocab_size:
        return "the tokenizer is bytes"
    return f"neither tokenizer.json nor a .model of sentencepiece came with these {vocab_size:,} tokens: bytes stand in for it"


def _beside(folder: Path) -> list[Path]:
    read_config(folder)
    return open_huggingface(folder).beside


def _original_config(origin: Mapping[str, Path], model: Model, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The config.json that the weights came with, if they still are that model. Raises CheckpointError where --like isn't."""
    if CONFIG not in origin:
        return None
    config = read_config(origin[CONFIG].parent)
    theirs = model_of(config, str(origin[CONFIG]))
    problems = differences(model, theirs, ("here", "there"))
    if theirs.vocab_size != model.vocab_size:
        problems.append(f"model.vocab_size: {model.vocab_size} here, {theirs.vocab_size} there")
    if problems and arguments.like:
        raise CheckpointError(f"--like {arguments.like} is another model: " + "; ".join(problems))
    return config if not problems and arguments.family in (None, config["model_type"]) else None


def _end_of_document(section: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's eos_token_id and bos_token_id: a document starts where one ends. Without the tokenizer's file: none."""
    try:
        eod = load_tokenizer(argparse.Namespace(**section)).eod
    except DataError:
        return {}
    return {} if eod is None else {"eos_token_id": eod, "bos_token_id": eod}


if __name__ == "__main__":
    raise SystemExit(main())
