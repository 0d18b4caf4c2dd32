"""The cache of keys and values: parts of any size, unequal lengths, room that grows, and a training path that it leaves alone."""

from __future__ import annotations

import pytest
import torch

from megalm.config import validate
from megalm.engine.sequential import SequentialModel
from megalm.model import layers
from megalm.model.cache import LEAST_ROOM, KeyValueCache
from megalm.parallel.groups import TensorParallel
from megalm.parallel.random import StepContext
from megalm.plan import make_plan

SEQ, VOCAB, CPU = 200, 64, torch.device("cpu")
PAGES = [None, 16, 64]
FAMILIES = {
    "gpt2": {},
    "llama": {"num_query_groups": 2, "normalization": "rms_norm", "activation": "swiglu", "position_embedding": "rotary",
              "tie_embeddings": False, "bias": False, "qk_norm": True},
    "mqa": {"num_query_groups": 1, "position_embedding": "rotary"},
    "window": {"num_query_groups": 2, "position_embedding": "rotary", "sliding_window": 12},
}


def model(family: str, **kernels) -> SequentialModel:
    config = validate({
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": SEQ, "vocab_size": VOCAB,
                  "dropout": 0.1, "attention_dropout": 0.1, "init_std": 0.3, **FAMILIES[family]},
        "batch": {"micro": 1, "global": 1}, "precision": {"dtype": "fp32"}, "optimizer": {"lr": 1e-3}, "kernels": kernels,
        "recompute": {"mode": "selective"}, "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "none"}]},
        "train": {"dir": "none", "steps": 1},
    })  # fmt: skip
    return SequentialModel(layers(config, make_plan(config, 1), TensorParallel(), StepContext(1)), None).eval()


def tokens(batch: int, n: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_of_any_size_give_the_whole(family, page):
    """A prompt, single tokens, a few (as speculative decoding has them) and many, over several doublings of the room."""
    whole, text, cache, found, at = model(family), tokens(2, SEQ), KeyValueCache(2, SEQ, CPU, page), [], 0
    expected = whole.outputs(text)[0]
    for n in (7, 1, 1, 5, 1, 60, 16, 1, 17, SEQ - 109):
        with cache.adding(whole, [n, n]):
            found.append(whole.outputs(text[:, at:at + n])[0])
        at += n
    assert cache.lengths == [SEQ, SEQ]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unequal_lengths(family, page):
    """Prompts of 3, 9 and 1 tokens, then parts in which sequences differ too: each gets what it gets alone."""
    whole, text, cache, seen = model(family), tokens(3, 60), KeyValueCache(3, SEQ, CPU, page), [0, 0, 0]
    expected = whole.outputs(text)[0]
    for counts in ([3, 9, 1], [1, 1, 1], [1, 4, 2], [20, 3, 20], [1, 1, 1]):
        n = max(counts)
        part = torch.full((3, n), VOCAB - 1)
        for i, count in enumerate(counts):
            part[i, :count] = text[i, seen[i]:seen[i] + count]
        with cache.adding(whole, counts):
            hidden = whole.outputs(part)[0]
        for i, count in enumerate(counts):
            torch.testing.assert_close(hidden[:count, i], expected[seen[i]:seen[i] + count, i], rtol=1e-5, atol=1e-5)
            seen[i] += count
    assert cache.lengths == seen


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_may_reach_beyond_the_most(family, page):
    """A full sequence takes its last tokens beside one that takes more of them than there is room after it."""
    whole, text, cache = model(family), tokens(2, SEQ), KeyValueCache(2, SEQ, CPU, page)
    expected, seen = whole.outputs(text)[0], [0, 0]
    for counts in ([SEQ - 3, 2], [1, 7], [2, 20], [0, 1]):
        part = torch.full((2, max(counts)), VOCAB - 1)
        for i, count in enumerate(counts):
            part[i, :count] = text[i, seen[i]:seen[i] + count]
        with cache.adding(whole, counts):
            hidden = whole.outputs(part)[0]
        for i, count in enumerate(counts):
            torch.testing.assert_close(hidden[:count, i], expected[seen[i]:seen[i] + count, i], rtol=1e-5, atol=1e-5)
            seen[i] += count
    with pytest.raises(ValueError, match="1 more tokens after 200 don't fit into a cache of 200"), cache.adding(whole, [1, 1]):
        pass


@torch.no_grad()
def test_the_room_doubles_up_to_the_most():
    whole, cache, rooms = model("llama"), KeyValueCache(1, SEQ, CPU), []
    for n in (3, LEAST_ROOM - 3, 1, 60, 73):
        with cache.adding(whole, [n]):
            whole.outputs(tokens(1, n))
        kept = [layer for layer in cache._layers.values() if layer.keys is not None][0]
        rooms.append(kept.keys.shape[2])
        assert kept.keys.shape == kept.values.shape == (1, 2, rooms[-1], 8)
    assert rooms == [64, 64, 128, 128, 200]
    with pytest.raises(ValueError, match="3 more tokens after 198 don't fit into a cache of 200"), cache.adding(whole, [3]):
        pass


@torch.no_grad()
def test_a_sequence_has_the_pages_of_its_own_length_and_gives_them_back():
    """A short one beside a long one; the next long one takes the pages of the one that has ended, and reads none of it."""
    whole, text, cache = model("llama"), tokens(3, SEQ), KeyValueCache(3, SEQ, CPU, 16)

    def read(counts, rows):
        part = torch.zeros(3, max(counts), dtype=torch.int64)
        for i, (count, row) in enumerate(zip(counts, rows, strict=True)):
            part[i, :count] = text[row, cache.lengths[i]:cache.lengths[i] + count]
        with cache.adding(whole, counts):
            return whole.outputs(part)[0]

    def store():
        return next(layer.keys for layer in cache._layers.values() if layer.keys is not None)

    read([100, 5, 1], [0, 1, 2])
    assert [len(owned) for owned in cache.pages.owned] == [7, 1, 1] and store().shape == (10, 16, 2, 8)
    cache.drop(0)
    assert cache.lengths == [0, 5, 1] and len(cache.pages.free) == 7
    hidden = read([0, 90, 12], [0, 1, 2])
    assert [len(owned) for owned in cache.pages.owned] == [0, 6, 1] and store().shape[0] == 10
    expected = whole.outputs(text[:, :95])[0]
    torch.testing.assert_close(hidden[:90, 1], expected[5:, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[:12, 2], expected[1:13, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read([20, 1, 1], [2, 1, 2])[:20, 0], expected[:20, 2], rtol=1e-5, atol=1e-5)
    owned = sum(cache.pages.owned, [])
    assert sorted([*owned, *cache.pages.free]) == list(range(1, cache.pages.count)) and cache.pages.count == 10


def test_after_it_the_model_is_as_before_and_training_never_sees_it():
    whole, text = model("gpt2", attention="reference"), tokens(1, 8)
    before = whole.outputs(text)[0]
    cache = KeyValueCache(1, SEQ, CPU)
    with pytest.raises(ZeroDivisionError), cache.adding(whole, [8]):
        whole.outputs(text)
        raise ZeroDivisionError
    assert torch.equal(whole.outputs(text)[0], before) and cache.lengths == [0]
    with pytest.raises(AssertionError), cache.adding(whole.train(), [8]):
        pass
