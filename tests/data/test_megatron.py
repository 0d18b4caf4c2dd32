"""Megatron-Core's own builder and reader as the oracle: its bytes are ours, it reads ours, we read its."""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed import IndexedReader, IndexedWriter
from megalm.data.rewrite import Part, Rewritten

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core isn't installed")


def one_each(documents):
    return [{"tokens": tokens, "lengths": [len(tokens)]} for tokens in documents]


def random_documents(dtype):
    random, high = np.random.default_rng(3), np.iinfo(dtype).max
    lengths = random.integers(0, 50, 200)
    return one_each(random.integers(0, high, length, endpoint=True).tolist() for length in lengths)


SHAPES = {
    "golden": lambda dtype: one_each([[1, 2, 3], [4, 5]]),
    "single": lambda dtype: one_each([[7]]),
    "empty_sequences": lambda dtype: one_each([[], [1], [], [], [2, 3], []]),
    "empty_documents": lambda dtype: [{"tokens": [1], "lengths": [1]}, {"tokens": [], "lengths": []},
                                      {"tokens": [2, 3], "lengths": [2]}, {"tokens": [], "lengths": []}],
    "several_sequences": lambda dtype: [{"tokens": [1, 2, 3, 4, 5], "lengths": [2, 0, 3]}, {"tokens": [6], "lengths": [1]}],
    "random": random_documents,
}
IMAGES = {  # multimodal: a mode for each sequence
    "images_a": [{"tokens": [1, 2, 3], "lengths": [2, 1], "modes": [0, 1]}, {"tokens": [4], "lengths": [1], "modes": [0]}],
    "images_b": [{"tokens": [5, 6], "lengths": [1, 1], "modes": [1, 0]}],
}
MERGES = [
    {"name": "merged_sequences", "dtype": "int32", "multimodal": False,
     "of": ["several_sequences_int32", "empty_documents_int32", "random_int32", "golden_int32"]},
    {"name": "merged_one", "dtype": "uint16", "multimodal": False, "of": ["random_uint16"]},
    {"name": "merged_empty", "dtype": "uint16", "multimodal": False, "of": ["empty_sequences_uint16", "single_uint16"]},
    {"name": "merged_images", "dtype": "uint16", "multimodal": True, "of": ["images_a", "images_b"]},
]
CASES = [(f"{shape}_{dtype}", shape, dtype) for shape in SHAPES for dtype in ("uint16", "int32")]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> tuple[Path, dict]:
    """(folder, what Megatron-Core read from our files, by case), from one process for all cases."""
    folder = tmp_path_factory.mktemp("megatron")
    cases = [{"name": name, "dtype": dtype, "documents": SHAPES[shape](dtype)} for name, shape, dtype in CASES]
    for case in cases:
        with IndexedWriter(folder / f"ours_{case['name']}", case["dtype"]) as writer:
            for document in case["documents"]:
                writer.add_document(document["tokens"], document["lengths"])
    images = [{"name": name, "dtype": "uint16", "multimodal": True, "documents": documents} for name, documents in IMAGES.items()]
    (folder / "cases.json").write_text(json.dumps(cases + images))
    (folder / "merges.json").write_text(json.dumps(MERGES))
    script = Path(__file__).with_name("megatron_oracle.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    return folder, {case["name"]: (case, result) for case, result in zip(cases, read, strict=True)}


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_same_bytes_and_each_reads_the_other(oracle, name):
    folder, results = oracle
    case, read = results[name]
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours_{name}{suffix}").read_bytes() == (folder / f"theirs_{name}{suffix}").read_bytes()
    sequences, documents = [], [0]
    for document in case["documents"]:
        ends = np.cumsum([0, *document["lengths"]])
        sequences += [document["tokens"][low:high] for low, high in zip(ends, ends[1:], strict=False)]
        documents.append(len(sequences))
    assert read == {"sequences": sequences, "documents": documents, "dtype": case["dtype"]}
    theirs = IndexedReader(folder / f"theirs_{name}")
    assert [theirs.tokens(i).tolist() for i in range(len(theirs))] == sequences
    assert theirs.document_indices.tolist() == documents and theirs.dtype == case["dtype"]


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge["name"])
def test_merged_as_their_builder_merges(oracle, tmp_path, merge):
    folder, _ = oracle
    output = Rewritten(tmp_path / "ours")
    output.write([Part(IndexedReader(folder / f"theirs_{name}", multimodal=merge["multimodal"])) for name in merge["of"]],
                 lambda size: None)
    output.publish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (folder / f"theirs_{merge['name']}{suffix}").read_bytes()


def test_their_modes_are_read(oracle):
    folder, _ = oracle
    assert IndexedReader(folder / "theirs_merged_images", multimodal=True).modes.tolist() == [0, 1, 0, 1, 0]
