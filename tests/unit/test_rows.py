"""Packed rows: written once, mapped, fetched once a node."""

import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from udrl import storage
from udrl.train import packed_rows as rows
from udrl.train.packed_rows import Rows
from udrl.train.packing import Batch

CONTEXT = 48


def some_rows(n: int, vocab_size: int = 1000, seed: int = 0, context: int = CONTEXT) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (n, context)
    return Batch(rng.integers(0, vocab_size, shape), rng.integers(0, context, shape), rng.random(shape) < 0.4)


def written(folder: Path, sizes: list[int]) -> list[Batch]:
    batches = [some_rows(n, seed=i) for i, n in enumerate(sizes)]
    for i, batch in enumerate(batches):
        rows.write(str(folder / f"rows-{i:06d}.arrow"), batch, vocab_size=1000)
    return batches


def load(folder: Path) -> Rows:
    return Rows(rows.local_files(str(folder), "mark"), CONTEXT)


def test_rows_of_several_files_are_taken_in_any_order(tmp_path: Path) -> None:
    batches = written(tmp_path, [5, 0, 7, 1])  # one file without rows among them
    loaded = load(tmp_path)
    assert len(loaded) == 13
    wanted = np.array([12, 0, 4, 5, 11, 5])
    taken = loaded.take(wanted)
    assert (taken.tokens.dtype, taken.positions.dtype, taken.targets.dtype) == (np.int64, np.int64, bool)
    for name in ("tokens", "positions", "targets"):
        whole = np.concatenate([getattr(batch, name) for batch in batches])
        assert np.array_equal(getattr(taken, name), whole[wanted])


def test_target_counts_say_how_much_a_row_teaches(tmp_path: Path) -> None:
    batches = written(tmp_path, [5, 7])
    loaded = load(tmp_path)
    assert loaded.target_counts.dtype == np.int32
    assert loaded.target_counts.tolist() == [int(n) for batch in batches for n in batch.targets.sum(axis=1)]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    loaded = load(tmp_path / "absent")
    assert len(loaded) == 0
    assert len(loaded.target_counts) == 0
    assert loaded.take(np.array([], dtype=np.int64)).tokens.shape == (0, CONTEXT)


def test_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [5])
    with pytest.raises(IndexError, match="of 5"):
        load(tmp_path).take(np.array([5]))


@pytest.mark.parametrize(("vocab_size", "bytes_a_token"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_two_bytes_where_they_fit(tmp_path: Path, vocab_size: int, bytes_a_token: int) -> None:
    batch = some_rows(2000, vocab_size)
    batch.tokens[0, 0] = vocab_size - 1
    rows.write(str(tmp_path / "rows.arrow"), batch, vocab_size)
    assert np.array_equal(load(tmp_path).take(np.arange(2000)).tokens, batch.tokens)
    a_row = (tmp_path / "rows.arrow").stat().st_size / 2000
    assert a_row == pytest.approx(CONTEXT * (bytes_a_token + 2 + 1) + 4, rel=0.02)


def test_rows_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.arrow")
    rows.write(path, some_rows(40_000, context=256), vocab_size=1000)
    this = psutil.Process()

    def own_memory() -> int:
        """Without pages of files, which the kernel takes back when it needs them."""
        return this.memory_info().rss - this.memory_info().shared

    before, files = own_memory(), this.num_fds()
    loaded = Rows([path], 256)
    for start in range(0, 40_000, 100):
        loaded.take(np.arange(start, start + 100))
    assert own_memory() - before < os.path.getsize(path) / 5  # of 50 MB, all of which were looked at
    assert this.num_fds() == files  # a run has thousands of files


def test_workers_of_one_node_fetch_each_file_once(tmp_path: Path) -> None:
    far, near = tmp_path / "far", str(tmp_path / "near")
    batches = written(far, [3, 2, 4])
    names = storage.list_files(str(far))
    fetched: list[int] = []
    together = threading.Barrier(4)

    def worker() -> None:
        together.wait()
        fetched.append(rows.fetch(str(far), names, near))

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert sorted(fetched) == [0, 0, 0, 3]
    loaded = Rows([os.path.join(near, name) for name in names], CONTEXT)
    assert np.array_equal(loaded.take(np.arange(9)).tokens, np.concatenate([batch.tokens for batch in batches]))


def test_what_a_killed_worker_left_half_is_fetched_again_and_the_rest_is_not(tmp_path: Path) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    written(far, [3, 2])
    names = storage.list_files(str(far))
    rows.fetch(str(far), names, str(near))
    (near / names[1]).rename(near / f".{names[1]}.half")  # as it lies there before its end
    assert rows.fetch(str(far), names, str(near)) == 1
    assert (near / names[1]).read_bytes() == (far / names[1]).read_bytes()


def test_rows_of_an_object_store_are_fetched_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = written(tmp_path / "far", [3, 2])
    monkeypatch.setenv("UDRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    names = rows.local_files(str(tmp_path / "far"), "one")
    assert all(name.startswith(str(tmp_path / "cache" / "rows")) for name in names)
    times = [os.stat(name).st_mtime_ns for name in names]
    assert rows.local_files(str(tmp_path / "far"), "one") == names
    assert [os.stat(name).st_mtime_ns for name in names] == times
    assert np.array_equal(Rows(names, CONTEXT).take(np.arange(3)).tokens, batches[0].tokens)
    # Rows that were made anew in the same place are others.
    assert set(rows.local_files(str(tmp_path / "far"), "two")).isdisjoint(names)
