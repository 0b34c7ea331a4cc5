"""Writes are atomic, and a storage problem is one line with its remedy before anything was generated."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.errors import UserError


class Torn(Exception):
    """Stands for the death of the process."""


def test_a_file_reads_back_the_last_write(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "new", "folder", "file")
    storage.write_bytes(uri, b"once")
    storage.write_bytes(uri, b"twice")
    assert storage.read_bytes(uri) == b"twice"
    assert storage.list_files(storage.join(str(tmp_path), "new", "folder")) == ["file"]


def test_a_file_uri_and_a_path_name_the_same_file(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a", b"x")
    assert storage.read_bytes(f"{tmp_path}/a") == b"x"
    assert storage.is_local(f"file://{tmp_path}/a")


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Torn

    monkeypatch.setattr(os, "replace", die)  # the last step before the file appears
    with pytest.raises(Torn):
        storage.write_bytes(str(tmp_path / "file"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def write_half() -> None:
        with storage.atomic_file(uri) as file:
            file.write(b"new, and more to co")
            file.flush()
            raise Torn

    with pytest.raises(Torn):
        write_half()
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(str(tmp_path)) == ["file"]


def test_a_streamed_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    with storage.atomic_file(uri) as file:
        file.write(b"half")
        file.flush()
        assert not storage.exists(uri)
        assert storage.list_files(str(tmp_path)) == []
    assert storage.read_bytes(uri) == b"half"


def test_a_listing_has_sorted_files_without_partial_ones_and_folders(tmp_path: Path) -> None:
    for name in ("b", "a", ".a.6f2d", ".probe-1"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert storage.list_files(str(tmp_path)) == ["a", "b"]


def test_the_listing_of_an_absent_folder_is_empty(tmp_path: Path) -> None:
    assert storage.list_files(str(tmp_path / "absent")) == []


def test_folders_and_the_sizes_of_all_files_below_one_are_listed(tmp_path: Path) -> None:
    for name, data in (("a", b"1"), ("deep/b", b"22"), ("deep/er/c", b"")):
        storage.write_bytes(storage.join(str(tmp_path), name), data)
    assert storage.list_folders(str(tmp_path)) == ["deep"]
    assert storage.file_sizes(str(tmp_path)) == {"a": 1, "deep/b": 2, "deep/er/c": 0}
    assert storage.list_folders(str(tmp_path / "absent")) == []
    assert storage.file_sizes(str(tmp_path / "absent")) == {}


def test_parquet_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for name, value in (("part-10.parquet", 2), ("part-02.parquet", 1), ("part-11.parquet", 3)):
        storage.write_table(storage.join(folder, name), pa.table({"x": [value], "y": [0]}))
    storage.write_json(storage.join(folder, "manifest.json"), {})
    assert [table.to_pylist() for table in storage.iter_tables(folder, ["x"])] == [[{"x": 1}], [{"x": 2}], [{"x": 3}]]
    sums = storage.map_files(lambda uri: sum(storage.read_table(uri)["x"].to_pylist()), storage.parquet_files(folder))
    assert sums == [1, 2, 3]


def test_files_folders_and_absent_ones_can_be_removed(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "folder" / "deep" / "file"), b"x")
    storage.write_bytes(str(tmp_path / "file"), b"x")
    for name in ("folder", "file", "absent"):
        storage.remove(str(tmp_path / name))
        assert not storage.exists(str(tmp_path / name))


def test_a_missing_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as error:
        storage.read_bytes(str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in str(error.value)


def test_the_write_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    storage.require_writable(str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_unwritable_storage_is_a_one_line_error_with_its_remedy(tmp_path: Path) -> None:
    # A path below a file, because root ignores file modes.
    (tmp_path / "file").write_bytes(b"content")
    uri = str(tmp_path / "file" / "runs")
    with pytest.raises(UserError) as error:
        storage.require_writable(uri)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"storage {uri}: not writable")
    assert "set storage=" in line
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "://x", "s3://bucket/x?nosuch=1"])
def test_a_uri_that_cannot_be_opened_is_a_one_line_error(uri: str) -> None:
    with pytest.raises(UserError) as error:
        storage.open_filesystem(uri)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{uri}: can't be opened")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(value=json_values)
def test_json_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    uri = str(tmp_path_factory.getbasetemp() / "value.json")
    storage.write_json(uri, value)
    assert storage.read_json(uri) == value


def test_the_order_of_keys_does_not_change_a_json_file(tmp_path: Path) -> None:
    for name, value in (("a", {"x": 1, "y": "größe"}), ("b", {"y": "größe", "x": 1})):
        storage.write_json(str(tmp_path / name), value)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "größe" in (tmp_path / "a").read_text(encoding="utf-8"), "readable without unescaping"


def test_a_table_or_single_columns_of_it_read_back(tmp_path: Path) -> None:
    uri = str(tmp_path / "table.parquet")
    table = pa.table({"id": pa.array([1, 2], pa.int64()), "reward": pa.array([0.5, None], pa.float32())})
    storage.write_table(uri, table)
    assert storage.read_table(uri).equals(table)
    assert storage.read_table(uri, ["id"]).column_names == ["id"]


def test_a_folder_is_uploaded_and_a_local_one_is_used_in_place(tmp_path: Path) -> None:
    model = tmp_path / "model"
    storage.write_bytes(str(model / "weights" / "a"), b"x")
    storage.upload_folder(str(model), str(tmp_path / "run" / "model"))
    assert storage.read_bytes(str(tmp_path / "run" / "model" / "weights" / "a")) == b"x"
    assert storage.download_folder(str(tmp_path / "run" / "model"), str(tmp_path / "copy")) == str(tmp_path / "run" / "model")
    assert not (tmp_path / "copy").exists()


def test_parts_are_joined_below_a_path_or_a_uri() -> None:
    assert storage.join("s3://bucket/run", "a", "b") == "s3://bucket/run/a/b"
    assert storage.join("runs/x/", "a") == "runs/x/a"
    assert storage.join("/", "a") == "/a"


def test_only_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("runs/x") == str(tmp_path / "runs/x")
    assert storage.absolute("~/runs") == "/home/someone/runs"
    assert storage.absolute("gs://bucket/runs") == "gs://bucket/runs"


def test_a_query_stays_at_the_end_of_a_uri() -> None:
    uri = "s3://bucket/run?endpoint_override=localhost:9000"
    assert storage.join(uri, "a", "b.json") == "s3://bucket/run/a/b.json?endpoint_override=localhost:9000"
    assert storage.join("/folder/what?", "x") == "/folder/what?/x"


def test_datasets_reads_a_file_without_rows(tmp_path: Path) -> None:
    from datasets import load_dataset

    table = pa.table({"x": [1, 2]})
    storage.write_table(str(tmp_path / "part-0.parquet"), table.slice(0, 0))
    storage.write_table(str(tmp_path / "part-1.parquet"), table)
    assert storage.read_table(str(tmp_path / "part-0.parquet")).schema == table.schema
    loaded = load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["x"][:] == [1, 2]
