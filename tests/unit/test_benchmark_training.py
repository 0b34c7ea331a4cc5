"""The training benchmark compares trainings on the same examples."""

from pathlib import Path

import numpy as np

from benchmarks.hf_trainer import IGNORED, unpack
from udrl.train.packing import Examples, PackedRows, pack, write_rows

PAD = 1


def test_unpacking_returns_every_example_with_its_targets_as_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 30, size=200)
    starts = np.array([int(rng.integers(1, n)) for n in lengths])
    examples = Examples(rng.integers(2, 500, size=lengths.sum()).astype(np.int32), lengths, starts)
    path = str(tmp_path / "rows.arrow")
    write_rows(path, pack(examples, 32, PAD), 500)

    unpacked = unpack(PackedRows([path], 32), PAD, chunk=16)

    ends = np.cumsum(lengths)
    expected = []
    for end, length, start in zip(ends, lengths, starts, strict=True):
        ids = examples.tokens[end - length : end].tolist()
        expected.append((ids, [IGNORED] * start + ids[start:]))
    assert sorted((e["input_ids"], e["labels"]) for e in unpacked) == sorted(expected)
