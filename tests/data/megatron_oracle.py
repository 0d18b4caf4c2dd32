"""Run in its own process, as importing Megatron-Core takes seconds and changes global state: its builder and its reader.

Arguments: a folder. cases.json there is a list of {"name", "dtype", "documents": [{"tokens", "lengths"}]}. Writes
theirs_<name>.bin/.idx, reads ours_<name>, and prints [{"sequences", "documents", "dtype"}] of the latter as its last line.
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
        name, dtype = case["name"], getattr(numpy, case["dtype"])
        builder = IndexedDatasetBuilder(str(folder / f"theirs_{name}.bin"), dtype=dtype)
        for document in case["documents"]:
            builder.add_document(torch.tensor(document["tokens"], dtype=torch.int64), document["lengths"])
        builder.finalize(str(folder / f"theirs_{name}.idx"))
        ours = IndexedDataset(str(folder / f"ours_{name}"))
        read.append({
            "sequences": [ours[i].tolist() for i in range(len(ours))], "documents": ours.document_indices.tolist(),
            "dtype": ours[0].dtype.name,
        })
    print(json.dumps(read))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
