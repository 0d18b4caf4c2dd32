"""`megalm convert`: both ways through the command, what generate and transformers make of the result, and its memory."""
from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from megalm.checkpoint import find, read_weights
from megalm.checkpoint.huggingface.tokenizer import tokenizer_config, tokenizer_doubt
from megalm.data.tokenizer import BytesTokenizer, TokenizerSource, load_tokenizer
from megalm.tools.convert import _tokenizer_of, main
from megalm.tools.generate import load_model
from megalm.tools.train_tokenizer import main as train_tokenizer
from tests import training
from tests.checkpoint.test_huggingface import change_config, equal, tensors
from tests.data.models import LINES, make_sentencepiece
from tests.model.transformers_weights import VOCAB, build, save
from tests.tools.test_generate import CPU, GPT2, LLAMA, checkpoint


def wordlevel(folder: Path) -> None:
    """A tokenizer.json of as many words as the models have rows, and what transformers keeps beside it."""
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<eos>": VOCAB - 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
               "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": "{{ messages }}"}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox"])
def test_there_and_back(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(name)
    save(model.to(torch.bfloat16) if name == "qwen2" else model, tmp_path / "hf")
    wordlevel(tmp_path / "hf")
    change_config(tmp_path / "hf", bos_token_id=3, something_else="kept")
    assert main(["--from", f"hf:{tmp_path / 'hf'}", "--to", str(tmp_path / "ours")]) == 0
    assert main(["--from", str(tmp_path / "ours"), "--to", f"hf:{tmp_path / 'back'}"]) == 0
    assert equal(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "back"))
    assert after.pop("torch_dtype") == before.pop("dtype", None) and before == after
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    loaded = load_model(find(tmp_path / "ours"), CPU)
    ids = loaded.tokenizer.encode("w1 w7 w200")
    assert ids == [1, 7, 200] and loaded.tokenizer.eod == VOCAB - 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(loaded.next_logits([ids])[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, theirs", [("sentencepiece", "tokenizer.model"), ("huggingface", "tokenizer.json")])
def test_the_tokenizer_of_a_run_goes_there_and_back(kind, theirs, tmp_path, capsys):
    """Under the name that Hugging Face's libraries look for; a sentencepiece model is found under any."""
    if kind == "sentencepiece":
        make_sentencepiece(tmp_path / "of a run.model")
        source = TokenizerSource(kind, str(tmp_path / "of a run.model"))
    else:
        wordlevel(tmp_path)
        (tmp_path / "tokenizer.json").rename(tmp_path / "of a run.json")
        source = TokenizerSource(kind, str(tmp_path / "of a run.json"), "<eos>")
    text, own = "w1 w7 w20", load_tokenizer(source)
    folder, _ = checkpoint(tmp_path / "run", LLAMA, tokenizer={"type": kind, "path": source.path, "eod": source.eod})
    assert main(["--from", str(folder), "--to", f"hf:{tmp_path / 'hf'}"]) == 0
    assert f"the tokenizer is {theirs}" in capsys.readouterr().out
    assert (tmp_path / "hf" / theirs).read_bytes() == Path(source.path).read_bytes()
    if kind == "sentencepiece":
        assert own.eod == 2 and json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
        (tmp_path / "hf" / theirs).rename(tmp_path / "hf" / "spm.model")
    assert main(["--from", f"hf:{tmp_path / 'hf'}", "--to", str(tmp_path / "back")]) == 0
    assert "the tokenizer is bytes" not in capsys.readouterr().out
    found = load_model(find(tmp_path / "back"), CPU).tokenizer
    assert (found.type, found.vocab_size, found.eod, found.encode(text)) == (kind, own.vocab_size, own.eod, own.encode(text))
    assert main(["--from", str(tmp_path / "back"), "--to", f"hf:{tmp_path / 'again'}"]) == 0
    assert any(path.read_bytes() == Path(source.path).read_bytes() for path in (tmp_path / "again").glob("*.[mj]*"))


WORDS = ["def add(a, b):  # of  two\n    return a+b\n", " leading", "\t\n\n  x", "h\xe9llo w\xf6rld 12345", "I'm don't WE'LL"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte-bpe"])
def test_transformers_cuts_text_as_the_run_did(kind, tmp_path, capsys):
    """In a model of a family whose own tokenizers would cut it otherwise: transformers takes the class that the folder names."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    (tmp_path / "text.txt").write_text("\n".join(Path(file).read_text() for file in (__file__, training.__file__)))
    file = tmp_path / ("t.json" if kind == "byte-bpe" else "t.model")
    assert train_tokenizer(["--input", str(tmp_path / "text.txt"), "--vocab-size", "500", "--type", kind,
                            "--output", str(file)]) == 0
    named = ("huggingface", str(file), "<|endoftext|>") if kind == "byte-bpe" else ("sentencepiece", str(file))
    source = TokenizerSource(*named)
    own, section = load_tokenizer(source), {"type": source.type, "path": source.path, "eod": source.eod}
    folder, _ = checkpoint(tmp_path / "run", GPT2, tokenizer=section)
    capsys.readouterr()
    assert main(["--from", str(folder), "--to", f"hf:{tmp_path / 'hf'}"]) == 0
    assert "AutoTokenizer" not in capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in WORDS:
        assert theirs(text)["input_ids"] == own.encode(text), text
        assert theirs.decode(own.encode(text)) == text
    assert (theirs.eos_token_id, theirs.model_max_length) == (own.eod, 24)
    change_config(tmp_path / "hf", model_type="qwen2")
    generic = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert [generic(text)["input_ids"] for text in WORDS] == [own.encode(text) for text in WORDS]


def test_where_transformers_may_cut_otherwise_it_is_said(tmp_path):
    """A model that changes text first, and Qwen2, for which transformers has a class that no file changes."""
    plain = load_tokenizer(TokenizerSource("sentencepiece", str(make_sentencepiece(tmp_path / "plain.model"))))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, vocab_size=320, minloglevel=2,
                                             model_type="bpe", byte_fallback=True)
    (tmp_path / "nfkc.model").write_bytes(model.getvalue())
    changes = load_tokenizer(TokenizerSource("sentencepiece", str(tmp_path / "nfkc.model")))
    assert tokenizer_doubt(plain, "llama") is None and "compare ids" in tokenizer_doubt(changes, "llama")
    assert "PreTrainedTokenizerFast.from_pretrained does" in tokenizer_doubt(plain, "qwen2")
    assert tokenizer_doubt(BytesTokenizer(), "qwen2") is None
    assert tokenizer_config(changes, 8)["add_prefix_space"] and not tokenizer_config(plain, 8)["add_prefix_space"]
    assert tokenizer_config(BytesTokenizer(), 8) is None


def test_another_end_than_a_sentencepiece_model_s_own(tmp_path):
    """As models that were taught to chat have it."""
    save(build("llama"), tmp_path / "hf")
    change_config(tmp_path / "hf", vocab_size=VOCAB)
    make_sentencepiece(tmp_path / "hf" / "tokenizer.model")
    for named, kept, number in (("e", "e", None), ("</s>", None, 2), ("<|im_end|>", None, 2)):
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        section = _tokenizer_of({path.name: path for path in (tmp_path / "hf").iterdir()})
        assert section["eod"] == kept and (number is None or load_tokenizer(argparse.Namespace(**section)).eod == number)
        main(["--from", f"hf:{tmp_path / 'hf'}", "--to", str(tmp_path / f"ours{named[1:3]}")])
        config = json.loads((tmp_path / f"ours{named[1:3]}" / "config.json").read_text())
        assert config["tokenizer"]["eod"] == kept


def test_several_models_and_none(tmp_path, capsys):
    save(build("llama"), tmp_path / "hf")
    assert main(["--from", f"hf:{tmp_path / 'hf'}", "--to", str(tmp_path / "none")]) == 0
    assert f"neither tokenizer.json nor a .model of sentencepiece came with these {VOCAB:,} tokens" in capsys.readouterr().out
    for name in ("a.model", "b.model"):
        (tmp_path / "hf" / name).write_bytes(b"")
    assert main(["--from", f"hf:{tmp_path / 'hf'}", "--to", str(tmp_path / "two")]) == 2
    error = capsys.readouterr().err
    assert "which of a.model, b.model is the tokenizer? Name it tokenizer.model" in error and error.count("\n") == 1


@pytest.mark.parametrize("model, family", [(GPT2, "gpt2"), (LLAMA, "qwen3")], ids=["gpt2", "qwen3"])
def test_a_run_of_eight_ranks_to_transformers_and_back(model, family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _ = checkpoint(tmp_path / "run", model)
    assert main(["--from", str(tmp_path / "run"), "--to", f"hf:{tmp_path / 'hf'}", "--dtype", "fp32"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["eos_token_id"]) == (family, 257, 256)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = list(b"def main(")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(load_model(folder, CPU).next_logits([ids])[0], expected, atol=1e-4, rtol=0)
    assert main(["--from", f"hf:{tmp_path / 'hf'}", "--to", str(tmp_path / "back")]) == 0
    before, after = read_weights(folder), read_weights(tmp_path / "back")
    assert set(before) == set(after)
    for part, tensor in after.items():
        assert torch.equal(before[part][:tensor.shape[0]], tensor), part
        assert tensor.shape[0] == (257 if "embedding.word" in part or "head" in part else before[part].shape[0])


def test_a_bf16_run_is_written_as_it_computes_and_like_takes_what_goes_with_it(tmp_path, capsys):
    folder, _ = checkpoint(tmp_path / "run", LLAMA)
    assert main(["--from", str(folder), "--to", f"hf:{tmp_path / 'hf'}"]) == 0
    written, weights = load_file(tmp_path / "hf" / "model.safetensors"), read_weights(folder)
    assert torch.equal(written["model.norm.weight"], weights["final_norm.weight"].bfloat16())
    wordlevel(tmp_path / "hf")
    change_config(tmp_path / "hf", chat="kept", max_position_embeddings=999)
    assert main(["--from", str(folder), "--to", f"hf:{tmp_path / 'like'}", "--like", f"hf:{tmp_path / 'hf'}"]) == 0
    config = json.loads((tmp_path / "like" / "config.json").read_text())
    assert config["chat"] == "kept" and config["max_position_embeddings"] == 999
    assert (tmp_path / "like" / "tokenizer_config.json").exists()
    save(build("qwen3"), tmp_path / "other")
    assert main(["--from", str(folder), "--to", f"hf:{tmp_path / 'no'}", "--like", f"hf:{tmp_path / 'other'}"]) == 2
    error = capsys.readouterr().err
    assert "is another model: model.num_layers: 2 here, 3 there; model.hidden_size: 16 here, 64 there" in error
    assert error.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama-llama3", "qwen3", "gpt_neox"])
def test_the_printed_section_is_the_model(name, tmp_path, capsys):
    from megalm.checkpoint.huggingface import open_huggingface
    from megalm.config.schema import Model

    save(build(name), tmp_path)
    assert main(["--print-config", f"hf:{tmp_path}"]) == 0
    printed = json.loads(capsys.readouterr().out)["model"]
    assert Model(**printed) == open_huggingface(tmp_path).model
    assert "qkv_bias" not in printed and ("head_dim" in printed) == (name == "qwen3")


@pytest.mark.parametrize("arguments, message", [
    ([], "--from and --to are needed"),
    (["--from", "hf:/no/where", "--to", "x"], "/no/where: no such folder"),
    (["--from", "/no/where", "--to", "hf:x"], "/no/where: no such folder"),
    (["--from", "x", "--to", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
])
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_memory_follows_the_largest_tensor_not_the_model(tmp_path):
    """tools/bench_convert.py measures what a conversion adds to a process that has imported all it needs."""
    command = [sys.executable, "-m", "megalm.tools.bench_convert", "--hidden", "512", "--layers", "12", "--vocab", "16384",
               "--folder", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [row["way"] for row in rows] == ["hf to megalm", "megalm to hf"]
    for row in rows:
        assert row["model_bytes"] > 6 * row["largest_bytes"]
        assert row["added_bytes"] < 3 * row["largest_bytes"], row
