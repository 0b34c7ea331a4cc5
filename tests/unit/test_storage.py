"""A file under a run's storage is whole or absent; what can't be stored is one line before anything was paid for."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.errors import UserError


class Torn(Exception):
    """The process was about to die here."""


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "new", "folder", "file")
    storage.write_bytes(uri, b"once")
    storage.write_bytes(uri, b"twice")
    assert storage.read_bytes(uri) == b"twice"
    assert storage.list_files(storage.join(str(tmp_path), "new", "folder")) == ["file"]


def test_a_file_uri_and_a_path_are_the_same_place(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a", b"x")
    assert storage.read_bytes(f"{tmp_path}/a") == b"x"
    assert storage.is_local(f"file://{tmp_path}/a")


def test_a_write_that_fails_leaves_neither_the_file_nor_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Torn

    monkeypatch.setattr(os, "replace", die)  # the last moment before the file appears
    with pytest.raises(Torn):
        storage.write_bytes(str(tmp_path / "file"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
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


def test_a_streamed_file_is_not_there_before_its_end(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    with storage.atomic_file(uri) as file:
        file.write(b"half")
        file.flush()
        assert not storage.exists(uri)
        assert storage.list_files(str(tmp_path)) == []
    assert storage.read_bytes(uri) == b"half"


def test_listing_gives_sorted_files_without_partials_and_folders(tmp_path: Path) -> None:
    for name in ("b", "a", ".a.6f2d", ".probe-1"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert storage.list_files(str(tmp_path)) == ["a", "b"]


def test_listing_an_absent_folder_is_empty(tmp_path: Path) -> None:
    assert storage.list_files(str(tmp_path / "absent")) == []


def test_removing_takes_files_and_folders_and_forgives_absence(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "folder" / "deep" / "file"), b"x")
    storage.write_bytes(str(tmp_path / "file"), b"x")
    for name in ("folder", "file", "absent"):
        storage.remove(str(tmp_path / name))
        assert not storage.exists(str(tmp_path / name))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as error:
        storage.read_bytes(str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in str(error.value)


def test_storage_that_can_be_written_is_left_empty(tmp_path: Path) -> None:
    storage.require_writable(str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_storage_that_cannot_be_written_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    # Below a file, which root can't write either; file modes would not hinder root.
    (tmp_path / "file").write_bytes(b"mine")
    uri = str(tmp_path / "file" / "runs")
    with pytest.raises(UserError) as error:
        storage.require_writable(uri)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"storage {uri}: not writable")
    assert "set storage=" in line
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "://x", "s3://bucket/x?nosuch=1"])
def test_a_uri_that_cannot_be_opened_is_one_line(uri: str) -> None:
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


def test_json_is_written_the_same_way_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    for name, value in (("a", {"x": 1, "y": "größe"}), ("b", {"y": "größe", "x": 1})):
        storage.write_json(str(tmp_path / name), value)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "größe" in (tmp_path / "a").read_text(encoding="utf-8"), "readable as it stands"


def test_a_table_reads_back_whole_or_by_column(tmp_path: Path) -> None:
    uri = str(tmp_path / "table.parquet")
    table = pa.table({"id": pa.array([1, 2], pa.int64()), "reward": pa.array([0.5, None], pa.float32())})
    storage.write_table(uri, table)
    assert storage.read_table(uri).equals(table)
    assert storage.read_table(uri, ["id"]).column_names == ["id"]


def test_a_folder_is_copied_there_and_used_in_place_where_it_is_local(tmp_path: Path) -> None:
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


def test_a_query_stays_behind_the_path() -> None:
    uri = "s3://bucket/run?endpoint_override=localhost:9000"
    assert storage.join(uri, "a", "b.json") == "s3://bucket/run/a/b.json?endpoint_override=localhost:9000"
    assert storage.join("/folder/what?", "x") == "/folder/what?/x"


def test_a_file_without_rows_is_read_here_and_by_datasets(tmp_path: Path) -> None:
    from datasets import load_dataset

    table = pa.table({"x": [1, 2]})
    storage.write_table(str(tmp_path / "part-0.parquet"), table.slice(0, 0))
    storage.write_table(str(tmp_path / "part-1.parquet"), table)
    assert storage.read_table(str(tmp_path / "part-0.parquet")).schema == table.schema
    loaded = load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["x"][:] == [1, 2]
