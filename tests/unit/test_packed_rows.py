"""Packed rows: written once, mapped into memory, fetched once per node."""

import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from fakes.tiny_student import in_object_store

from udrl import storage
from udrl.train.packing import Batch, PackedRows, fetch_files, local_files, write_rows

CONTEXT = 48


def random_rows(n: int, vocab_size: int = 1000, seed: int = 0, context: int = CONTEXT) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (n, context)
    return Batch(rng.integers(0, vocab_size, shape), rng.integers(0, context, shape), rng.random(shape) < 0.4)


def write_files(folder: Path, sizes: list[int]) -> list[Batch]:
    batches = [random_rows(n, seed=i) for i, n in enumerate(sizes)]
    for i, batch in enumerate(batches):
        write_rows(str(folder / f"rows-{i:06d}.arrow"), batch, vocab_size=1000)
    return batches


def load(folder: Path) -> PackedRows:
    return PackedRows(local_files(str(folder), "mark"), CONTEXT)


def test_rows_of_several_files_are_taken_in_any_order(tmp_path: Path) -> None:
    batches = write_files(tmp_path, [5, 0, 7, 1])  # one file without rows among them
    loaded = load(tmp_path)
    assert len(loaded) == 13
    indices = np.array([12, 0, 4, 5, 11, 5])
    rows = loaded.take(indices)
    assert (rows.tokens.dtype, rows.positions.dtype, rows.targets.dtype) == (np.int64, np.int64, bool)
    for name in ("tokens", "positions", "targets"):
        expected = np.concatenate([getattr(batch, name) for batch in batches])[indices]
        assert np.array_equal(getattr(rows, name), expected)


def test_target_counts_are_the_tokens_with_loss_of_each_row(tmp_path: Path) -> None:
    batches = write_files(tmp_path, [5, 7])
    loaded = load(tmp_path)
    assert loaded.target_counts.dtype == np.int32
    assert loaded.target_counts.tolist() == [int(n) for batch in batches for n in batch.targets.sum(axis=1)]


def test_a_folder_without_files_has_no_rows(tmp_path: Path) -> None:
    loaded = load(tmp_path / "absent")
    assert len(loaded) == 0
    assert len(loaded.target_counts) == 0
    assert loaded.take(np.array([], dtype=np.int64)).tokens.shape == (0, CONTEXT)


def test_a_row_number_out_of_range_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, [5])
    with pytest.raises(IndexError, match="of 5"):
        load(tmp_path).take(np.array([5]))


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_two_bytes_if_the_vocabulary_is_small_enough(tmp_path: Path, vocab_size: int, bytes_per_token: int) -> None:
    batch = random_rows(2000, vocab_size)
    batch.tokens[0, 0] = vocab_size - 1
    write_rows(str(tmp_path / "rows.arrow"), batch, vocab_size)
    assert np.array_equal(load(tmp_path).take(np.arange(2000)).tokens, batch.tokens)
    bytes_per_row = (tmp_path / "rows.arrow").stat().st_size / 2000
    assert bytes_per_row == pytest.approx(CONTEXT * (bytes_per_token + 2 + 1) + 4, rel=0.02)


def test_rows_are_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.arrow")
    write_rows(path, random_rows(40_000, context=256), vocab_size=1000)
    this = psutil.Process()

    def own_memory() -> int:
        """Return the resident memory without pages of files, which the kernel can reclaim."""
        return this.memory_info().rss - this.memory_info().shared

    memory_before, files_before = own_memory(), this.num_fds()
    loaded = PackedRows([path], 256)
    for start in range(0, 40_000, 100):
        loaded.take(np.arange(start, start + 100))
    assert own_memory() - memory_before < os.path.getsize(path) / 5  # of 50 MB, all of which were read
    assert this.num_fds() == files_before  # a run has thousands of files


def test_workers_of_one_node_fetch_each_file_once(tmp_path: Path) -> None:
    remote, local = tmp_path / "remote", str(tmp_path / "local")
    batches = write_files(remote, [3, 2, 4])
    names = storage.list_files(str(remote))
    fetched_files: list[int] = []
    barrier = threading.Barrier(4)

    def worker() -> None:
        barrier.wait()
        fetched_files.append(fetch_files(str(remote), names, local))

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert sorted(fetched_files) == [0, 0, 0, 3]
    loaded = PackedRows([os.path.join(local, name) for name in names], CONTEXT)
    assert np.array_equal(loaded.take(np.arange(9)).tokens, np.concatenate([batch.tokens for batch in batches]))


def test_only_the_file_that_a_killed_worker_left_incomplete_is_fetched_again(tmp_path: Path) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    write_files(remote, [3, 2])
    names = storage.list_files(str(remote))
    fetch_files(str(remote), names, str(local))
    (local / names[1]).rename(local / f".{names[1]}.half")  # its name while it is being written
    assert fetch_files(str(remote), names, str(local)) == 1
    assert (local / names[1]).read_bytes() == (remote / names[1]).read_bytes()


def test_rows_of_an_object_store_are_fetched_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = write_files(tmp_path / "rows", [3, 2])
    monkeypatch.setenv("UDRL_CACHE", str(tmp_path / "cache"))
    with in_object_store(tmp_path / "rows") as uri:
        names = local_files(uri, "one")
        assert all(name.startswith(str(tmp_path / "cache" / "rows")) for name in names)
        times = [os.stat(name).st_mtime_ns for name in names]
        assert local_files(uri, "one") == names
        assert [os.stat(name).st_mtime_ns for name in names] == times
        assert np.array_equal(PackedRows(names, CONTEXT).take(np.arange(3)).tokens, batches[0].tokens)
        # Other rows in the same place are fetched into another folder.
        assert set(local_files(uri, "two")).isdisjoint(names)
