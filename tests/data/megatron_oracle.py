"""Run in its own process, as importing Megatron-Core takes seconds and changes global state: its builder and its reader.

Arguments: a folder. cases.json there is a list of {"name", "dtype", "documents": [{"tokens", "lengths"}]}. Writes
theirs_<name>.bin/.idx, reads ours_<name>, and prints [{"sequences", "documents", "dtype"}] of the latter as its last line.
merges.json is a list of {"name", "dtype", "multimodal", "of": [names]}: theirs_<name> is then those of theirs, merged.
The documents of a multimodal case have "modes", and it isn't read.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def main(folder: Path) -> None:
    read = []
    for case in json.loads((folder / "cases.json").read_text()):
        name, builder = case["name"], builder_of(folder, case)
        for document in case["documents"]:
            builder.add_document(torch.tensor(document["tokens"], dtype=torch.int64), document["lengths"], document.get("modes"))
        builder.finalize(str(folder / f"theirs_{name}.idx"))
        if case.get("multimodal"):
            continue
        ours = IndexedDataset(str(folder / f"ours_{name}"))
        read.append({
            "sequences": [ours[i].tolist() for i in range(len(ours))], "documents": ours.document_indices.tolist(),
            "dtype": ours[0].dtype.name,
        })
    for case in json.loads((folder / "merges.json").read_text()):
        builder = builder_of(folder, case)
        for name in case["of"]:
            builder.add_index(str(folder / f"theirs_{name}"))
        builder.finalize(str(folder / f"theirs_{case['name']}.idx"))
    print(json.dumps(read))


def builder_of(folder: Path, case: dict) -> IndexedDatasetBuilder:
    return IndexedDatasetBuilder(str(folder / f"theirs_{case['name']}.bin"), dtype=getattr(numpy, case["dtype"]),
                                 multimodal=case.get("multimodal", False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
