"""`megalm generate`: the model of a checkpoint of any layout in one process, and how tokens are drawn."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalm.checkpoint import find, save
from megalm.config import load
from megalm.data import Source, build_dataset
from megalm.data.tokenizer import load_tokenizer
from megalm.engine.sequential import SequentialModel
from megalm.model import layers
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import part_slices
from megalm.plan import make_plan
from megalm.tools.generate import Reading, Sampler, continuation, continue_ids, load_model, main, overrides
from tests import training
from tests.checkpoint.fakes import Crew, Hasty, engines, plant

GPT2 = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 24}
LLAMA = {**GPT2, "num_query_groups": 2, "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary",
         "tie_embeddings": False, "bias": False, "qk_norm": True}
LAYOUT = {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}
CPU = torch.device("cpu")


def reference(config_path: Path, seed: int) -> tuple[SequentialModel, dict]:
    """An unsharded fp32 model with random values everywhere (norms too), and {(part, "master"): full tensor}."""
    config = load(config_path, ["parallel={}", "batch={\"micro\": 1, \"global\": 1}", "precision.dtype=fp32"])
    plan = make_plan(config, 1, load_tokenizer(config.tokenizer).vocab_size)
    module = SequentialModel(layers(config, plan, TensorParallel(), StepContext(0)), None).eval()
    generator, parts = torch.Generator().manual_seed(seed), {}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
            for part, view in part_slices(parameter, parameter.detach()):
                parts[part.name, "master"] = view.clone()
    return module, parts


def checkpoint(folder: Path, model: dict, tokenizer: dict | None = None, change=lambda parts: None, step: int = 1):
    """A run with one checkpoint, saved by eight ranks; the unsharded model with the same weights."""
    folder.mkdir(exist_ok=True)
    path = folder / "source.json"
    path.write_text(json.dumps({
        "model": model, "parallel": LAYOUT, "batch": {"micro": 1, "global": 4}, "precision": {"dtype": "bf16"},
        "optimizer": {"lr": 0.1}, "tokenizer": tokenizer or {"type": "bytes"}, "data": {"train": [{"path": "none"}]},
        "train": {"dir": str(folder), "steps": 1, "seed": 3}}))
    config = load(path)
    module, values = reference(path, seed=step)
    change(values)
    plan = make_plan(config, 8, load_tokenizer(config.tokenizer).vocab_size)
    columns = ("projection.weight", "down.weight")
    parts = {name: (tuple(tensor.shape), 1 if name.endswith(columns) else 0 if tensor.dim() == 2 else None)
             for (name, _), tensor in values.items()}
    ranks = engines(parts, values, tp=2, pp=2, dp=2, roles=("master",))
    files = load_tokenizer(config.tokenizer).files()
    results = Crew(8).run(lambda groups: save(folder, step, 4 * step, ranks[groups.rank], groups, config, plan, files,
                                              disk=Hasty()))
    assert all(isinstance(result, Path) for result in results), results
    return results[0], module


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_model_of_an_eight_rank_checkpoint_gives_the_unsharded_model_s_logits(model, tmp_path):
    folder, module = checkpoint(tmp_path / "run", model)
    loaded = load_model(folder, CPU)
    ids = list(b"def main(")
    with torch.no_grad():
        hidden, weight = module.outputs(torch.tensor([ids]))
        expected = hidden[-1, 0] @ weight.T
    assert loaded.plan.padded_vocab_size == 384 and expected.shape == (384,)
    torch.testing.assert_close(loaded.next_logits([ids])[0], expected[:257])
    assert expected.std() > 0.1


def test_greedy_text_goes_on_with_the_likeliest_token_each_time(tmp_path, capsys):
    folder, module = checkpoint(tmp_path / "run", GPT2)
    ids = list(b"ab")
    with torch.no_grad():
        for _ in range(8):
            hidden, weight = module.outputs(torch.tensor([ids]))
            ids.append(int((hidden[-1, 0] @ weight[:257].T).argmax()))
    expected = bytes(token for token in ids[: ids.index(256) if 256 in ids else None] if token < 256).decode(errors="replace")
    assert main(["--checkpoint", str(tmp_path / "run"), "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main(["--checkpoint", str(folder), "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_the_same_seed_draws_the_same_text_and_another_another(tmp_path, capsys):
    checkpoint(tmp_path / "run", LLAMA)
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["--checkpoint", str(tmp_path / "run"), "--prompt", "x", "--max-new-tokens", "20", "--temperature", "3",
                     "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_padding_never_wins(tmp_path):
    """Columns of the padded vocabulary that beat all others by far are never drawn, greedy or not."""
    def change(values):
        values["head.weight", "master"][257:] = 100.0 * values["head.weight", "master"][257:].sign()

    folder, _ = checkpoint(tmp_path / "run", LLAMA, change=change)
    loaded = load_model(folder, CPU)
    for choose in (Sampler(0.0), Sampler(5.0)):
        assert all(0 <= choose(scores) < 257 for scores in loaded.next_logits([[65, token] for token in range(20)]))


def test_rows_that_no_token_has_never_win_either(tmp_path):
    """A model may have more rows than its tokenizer has tokens."""
    folder, _ = checkpoint(tmp_path / "run", {**GPT2, "vocab_size": 300})
    loaded = load_model(folder, CPU)
    assert loaded.plan.vocab_size == 300 and loaded.next_logits([[65]]).shape == (1, 257)


FAMILIES = {
    "learned": GPT2,
    "learned, untied": {**GPT2, "tie_embeddings": False},
    "rotary, GQA, QK norm": LLAMA,
    "rotary, sliding window": {**LLAMA, "sliding_window": 7},
    "rotary, MQA, tied": {**LLAMA, "num_query_groups": 1, "qk_norm": False, "tie_embeddings": True, "bias": True},
}


def greedy(loaded, text: list[int], steps: int) -> list[torch.Tensor]:
    """Scores before each of the likeliest tokens, with the whole window read for each."""
    most, known, start, found = loaded.config.model.seq_length, list(text), max(0, len(text) - 24), []
    for _ in range(steps):
        if len(known) - start > most:
            start = len(known) - most // 2
        found.append(loaded.next_logits([known[start:]])[0])
        known.append(int(found[-1].argmax()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_read_once_and_its_scores_are_those_of_reading_all_again(family, tmp_path):
    """Through a window that moves on twice, from a prompt that is longer than it."""
    folder, _ = checkpoint(tmp_path / "run", FAMILIES[family])
    loaded = load_model(folder, CPU)
    for text in (list(b"def main("), list(range(60))):
        reading = Reading(loaded, [text])
        for expected in greedy(loaded, text, 40):
            [scores] = reading.next_logits()
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
            assert scores.argmax() == expected.argmax()
            reading.add([int(scores.argmax())])


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_are_read_together_get_the_scores_of_each_alone(family, page, tmp_path):
    """Of unequal lengths, so that their windows move on at different times; one ends on the way, a window before the others."""
    folder, _ = checkpoint(tmp_path / "run", FAMILIES[family])
    loaded = load_model(folder, CPU)
    texts = [list(b"def main("), [65], list(range(60))]
    reading, alone = Reading(loaded, texts, page), [greedy(loaded, text, 40) for text in texts]
    for step in range(40):
        together, going = reading.next_logits(), [0, 2] if step > 9 else [0, 1, 2]
        torch.testing.assert_close(together[going], torch.stack([alone[text][step] for text in going]), rtol=1e-5, atol=1e-5)
        if step == 9:
            reading.end(1)
        reading.add(together.argmax(1).tolist())


def test_a_token_costs_one_token(tmp_path, monkeypatch):
    """However long the text is: what the model is given, over 40 tokens in a window of 24."""
    folder, _ = checkpoint(tmp_path / "run", LLAMA)
    loaded, given = load_model(folder, CPU), []
    outputs = loaded.module.outputs
    monkeypatch.setattr(loaded.module, "outputs", lambda tokens: given.append(tokens.shape[1]) or outputs(tokens))
    continue_ids(Reading(loaded, [list(range(20))]), None, 40, [Sampler(0.0)])
    assert given == [20, 1, 1, 1, 1, 12, *[1] * 12, 12, *[1] * 12, 12, *[1] * 8]


def test_the_smallest_window(tmp_path):
    folder, _ = checkpoint(tmp_path / "run", {**GPT2, "seq_length": 2})
    loaded = load_model(folder, CPU)
    reading = Reading(loaded, [[5, 6, 7]])
    for window in ([6, 7], [8], [8, 9], [10]):
        torch.testing.assert_close(reading.next_logits(), loaded.next_logits([window]), rtol=1e-5, atol=1e-5)
        reading.add([window[-1] + 1])


def test_several_prompts_are_a_json_object_each(tmp_path, capsys):
    checkpoint(tmp_path / "run", LLAMA)
    options = ["--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "5", "--temperature", "2"]
    assert main([*options, "--prompt", "a\nb", "--prompt", ""]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["prompt"] for one in found] == ["a\nb", ""]
    alone = []
    for prompt, seed in (("a\nb", "0"), ("", "1")):
        assert main([*options, "--prompt", prompt, "--seed", seed]) == 0
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    assert [one["text"] for one in found] == alone
    assert main([*options, "--prompt", "a\nb", "--prompt", "", "--page-size", "16"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    assert main([*options, "--prompt", "a", "--page-size", str(1 << 40)]) == 2
    assert capsys.readouterr().err == f"error: --page-size {1 << 40}: at most the model's window of 24 tokens expected\n"


def test_the_tokenizer_comes_from_the_checkpoint(tmp_path, capsys):
    """The file that the run was started with may be gone."""
    import sentencepiece
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the quick brown fox {number} jumps over the lazy dog" for number in range(200)))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "spm"), vocab_size=80, model_type="bpe",
                                             minloglevel=2)
    section = {"type": "sentencepiece", "path": str(tmp_path / "spm.model")}
    folder, _ = checkpoint(tmp_path / "run", GPT2, section)
    (tmp_path / "spm.model").unlink()
    assert load_model(folder, CPU).tokenizer.vocab_size == 80
    assert main(["--checkpoint", str(folder), "--prompt", "the quick", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_the_newest_whole_checkpoint_is_used_and_the_torn_one_named(tmp_path, capsys):
    checkpoint(tmp_path / "run", GPT2, step=1)
    torn, _ = checkpoint(tmp_path / "run", GPT2, step=2)
    (torn / "plan.json").unlink()
    assert main(["--checkpoint", str(tmp_path / "run"), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert "skipped step_00000002: plan.json is missing" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_document(tmp_path, capsys):
    checkpoint(tmp_path / "run", GPT2)
    assert main(["--checkpoint", str(tmp_path / "run"), "--prompt", "", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    with_prompt = capsys.readouterr().out
    loaded = load_model(tmp_path / "run/checkpoints/step_00000001", CPU)
    [new] = continue_ids(Reading(loaded, [[256]]), 256, 3, [Sampler(0.0)])
    assert with_prompt == loaded.tokenizer.decode(new) + "\n"


@pytest.mark.parametrize("arguments, line", [
    (["--checkpoint", "nowhere", "--prompt", "a"], "nowhere: no such folder"),
    (["--checkpoint", ".", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: a number above 0 and at most 1 expected"),
    (["--checkpoint", ".", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: a number of at least 0 expected"),
    (["--checkpoint", ".", "--prompt", "a", "--temperature", "nan"], "--temperature nan: a number of at least 0 expected"),
    (["--checkpoint", ".", "--prompt", "a", "--max-new-tokens", "0"], "0 is not a number of at least 1"),
    (["--checkpoint", ".", "--prompt", "a", "--page-size", "24"], "24 is not a power of two of at least 16"),
    (["--prompt", "a"], "--checkpoint"),
])
def test_mistakes_are_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    folder, _ = checkpoint(tmp_path / "run", GPT2)
    model = json.loads((folder / "config.json").read_text())["model"]

    def planted(**changes):
        plant(folder, "config.json", lambda config: config.update(model={**model, **changes}))
        assert main(["--checkpoint", str(folder), "--prompt", "a"]) == 2
        return capsys.readouterr().err

    assert "layers.2.attention.norm.weight isn't in the checkpoint" in planted(num_layers=3)
    assert "embedding.position.weight is [24, 16] in the checkpoint, [48, 16] here" in planted(seq_length=48)


def test_the_end_of_a_document_ends_the_text():
    """Of each text for itself; the others go on."""
    script, added, ended = iter([[5, 1], [6, 256], [256, 2], [7, 3]]), [], []

    def next_logits():
        return torch.nn.functional.one_hot(torch.tensor(next(script)), 257).float()

    reading = SimpleNamespace(next_logits=next_logits, add=added.append, end=ended.append)
    assert continue_ids(reading, 256, 10, [Sampler(0.0)] * 2) == [[5, 6], [1]]
    assert added == [[5, 1], [6, 256]] and ended == [1, 0]


def test_sampling_follows_the_softmax_at_that_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    choose = Sampler(0.7, seed=1)
    drawn = torch.bincount(torch.tensor([choose(logits) for _ in range(20000)]), minlength=4) / 20000
    torch.testing.assert_close(drawn, (logits / 0.7).softmax(0), atol=0.015, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.74, {1, 3}), (0.76, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        choose = Sampler(1.0, top_p, seed=3)
        assert {choose(logits) for _ in range(300)} == kept, top_p


def test_extreme_scores_and_temperatures():
    logits = torch.tensor([1e30, 3.0, -1e30, float("-inf")])
    assert Sampler(1e-30)(logits) == 0 and Sampler(1e-3)(torch.tensor([5.0, 5.1])) == 1
    assert {Sampler(1e6, seed=seed)(torch.tensor([5.0, -5.0])) for seed in range(30)} == {0, 1}


def test_a_tokenizer_that_drops_a_leading_space_loses_none():
    words = {1: "▁the", 2: "▁fox", 3: "es"}
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert continuation(tokenizer, [1], [2, 3]) == " foxes"


def test_a_model_that_was_trained_in_fp8_is_no_trouble_for_a_cpu(tmp_path):
    model = {**GPT2, "head_dim": 64, "attention_dropout": 0.0}
    path = training.write_config(tmp_path, model=model, train={"attention_fp8": True}, precision={"dtype": "bf16"})
    assert load(path, []).train.attention_fp8 and not load(path, overrides(CPU)).train.attention_fp8


ENGINES = {
    "zero3": (2, {"parallel": {"dp": 2, "zero_stage": 3}}),
    "bf16-tp2-pp2": (4, {"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}, "precision": {"dtype": "bf16"}}),
    "fewer groups than ranks": (4, {"parallel": {"tp": 4, "sequence_parallel": True}}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_wrote_predicts_as_the_model_in_place_did(engine, tmp_path):
    """The loss that a run evaluates after its last step is that of the model which generate loads from its checkpoint."""
    world, sections = ENGINES[engine]
    described = training.config(tmp_path, **sections)
    described["model"] |= {"qk_norm": True, "init_std": 0.3, "tie_embeddings": "pp2" in engine}
    described["train"] |= {"steps": 3, "eval_every": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(described))
    assert training.start(world, path) == [(0, "")] * world
    [in_place] = [record["eval_loss"] for record in training.records(tmp_path / "run") if "eval_loss" in record]
    loaded = load_model(find(tmp_path / "run"), CPU)
    dataset = build_dataset([Source(str(tmp_path / "valid"))], 16, 8, loaded.config.train.seed, None)
    samples = torch.stack([torch.from_numpy(dataset.tokens(index)) for index in range(8)])  # [b, s + 1]

    def loss() -> float:
        with torch.no_grad():
            hidden, weight = loaded.module.outputs(samples[:, :-1])
            logits = (hidden @ weight[:257].T).transpose(0, 1)  # [b, s, V]
            return torch.nn.functional.cross_entropy(logits.reshape(-1, 257), samples[:, 1:].reshape(-1)).item()

    half = "bf16" in engine
    bound = (2e-3 if half else 1e-5) * in_place
    assert abs(loss() - in_place) <= bound
    for name, parameter in loaded.module.named_parameters():  # any matrix in the wrong order, any norm's weight lost, would show
        if parameter.dim() == 1 and half:
            continue
        before = parameter.data.clone()
        parameter.data = before.flip(0) if before.dim() == 2 else before * 0.5
        assert abs(loss() - in_place) > bound, name
        parameter.data = before
