"""Bearer keys: what is made, what is kept, what is refused, and that nothing tells a hash."""

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import keys
from serve.keys import KeyRing, digest
from udrl.errors import UserError, exit_code

A, B = digest("udrl_a"), digest("udrl_b")


def _file(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = tmp_path / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


def test_a_made_key_is_known_by_its_name_and_the_file_holds_only_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    assert exit_code(keys.main, ["new", "team-a", "--file", str(path)]) == 0
    said = capsys.readouterr()
    key = said.out.removesuffix("\n")
    assert key.startswith("udrl_")
    assert len(key) == 48  # 32 bytes in base64
    assert "this once" in said.err
    assert key not in said.err
    assert path.read_text() == f"team-a:{digest(key)}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    ring = KeyRing.read(str(path), {})
    assert ring.name_of(key) == "team-a"
    assert ring.name_of(digest(key)) is None  # what the file holds opens nothing


def test_without_a_file_the_entry_is_printed_for_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["new", "ci"])
    key, entry = capsys.readouterr().out.splitlines()
    assert KeyRing.read(None, {"UDRL_API_KEYS": entry}).name_of(key) == "ci"


def test_keys_are_different_each_time() -> None:
    assert len({keys.new("x", None)[0] for _ in range(100)}) == 100


def test_a_key_is_added_to_a_file_whose_last_line_was_left_open(tmp_path: Path) -> None:
    path = _file(tmp_path, f"# ours\na:{A}")
    key, _ = keys.new("b", path)
    assert list(KeyRing.read(path, {}).entries) == ["a", "b"]
    assert KeyRing.read(path, {}).name_of(key) == "b"


def test_a_taken_name_leaves_the_file_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, f"a:{A}\n")
    assert exit_code(keys.main, ["new", "a", "--file", path]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "already" in said.err
    assert Path(path).read_text() == f"a:{A}\n"


@pytest.mark.parametrize("name", ["", "a:b", "a,b", "a b", "a#b", "a\n", "é", "x" * 65, "../a"])
def test_a_name_that_would_not_be_read_back_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name "):
        keys.new(name, str(tmp_path / "keys"))
    assert not (tmp_path / "keys").exists()


def test_of_two_that_add_a_name_at_once_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"

    def another_was_first(_file: object, how: int) -> None:
        assert how == keys.fcntl.LOCK_EX
        path.write_text(f"a:{A}\n")

    monkeypatch.setattr(keys.fcntl, "flock", another_was_first)  # what holding the lock waits for has happened
    with pytest.raises(UserError, match="already"):
        keys.new("a", str(path))
    assert path.read_text() == f"a:{A}\n"


def test_entries_stand_on_lines_or_between_commas_with_comments(tmp_path: Path) -> None:
    text = f"\ufeff# who\n\na:{A}  # the first\r\n b : {B.upper()} ,c:{digest('c')},\n"
    assert KeyRing.read(_file(tmp_path, text), {}).entries == {"a": A, "b": B, "c": digest("c")}


def test_the_environment_is_read_where_no_file_is_named(tmp_path: Path) -> None:
    environ = {"UDRL_API_KEYS": f"a:{A},b:{B}\n"}
    assert list(KeyRing.read(None, environ).entries) == ["a", "b"]
    assert list(KeyRing.read(_file(tmp_path, f"f:{A}"), environ).entries) == ["f"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("udrl_secretkey", "line 1: expected name:hash"),
        ("a:udrl_secretkey", "line 1: expected name:hash"),
        (f"x:{A}\n{A}", "line 2: expected name:hash"),
        (f"a b:{A}", "line 1: expected name:hash"),
        (f"a:{A[:-1]}", "line 1: expected name:hash"),
        (f"a:{A}0", "line 1: expected name:hash"),
        (f"a:{A}:b", "line 1: expected name:hash"),
        (f"a:{A}\n\na:{B}", "line 3: the name a stands there twice"),
        (f"a:{A},b:{A}", "line 1: b has the same key as a"),
        ("# nothing\n", "holds none"),
        ("", "is empty or not set"),
        (b"a:\xff\xfe", "not a text file"),
    ],
)
def test_a_bad_file_is_one_line_that_quotes_no_secret(
    tmp_path: Path, text: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(tmp_path, text)
    assert exit_code(keys.main, ["list", "--file", path]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert path in said
    assert "secretkey" not in said
    assert A[:-1] not in said


def test_a_missing_file_a_folder_and_an_empty_environment_are_one_line_each(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(UserError, match="can't be used"):
            KeyRing.read(path, {})
    with pytest.raises(UserError, match="can't be used"):
        keys.new("a", str(tmp_path / "no" / "folder"))
    with pytest.raises(UserError, match=r"UDRL_API_KEYS is empty or not set; make one with .*serve.require_keys=false"):
        KeyRing.read(None, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Permission denied"):
        KeyRing.read(_file(tmp_path, f"a:{A}", 0o000), {})


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o620, True)])
def test_a_file_that_others_can_read_or_change_is_warned_about(
    tmp_path: Path, mode: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    KeyRing.read(_file(tmp_path, f"a:{A}", mode), {})
    assert ("chmod 600" in capsys.readouterr().err) == warned


def test_listing_shows_names_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["list", "--file", _file(tmp_path, f"a:{A}\nb:{B}\n")])
    assert capsys.readouterr().out == "a\nb\n"


def test_the_ring_travels_between_processes_and_its_repr_has_no_hash() -> None:
    ring = pickle.loads(pickle.dumps(KeyRing({"a": A})))
    assert ring.name_of("udrl_a") == "a"
    assert A not in f"{ring!r} {ring}"


@given(st.text() | st.text(st.characters(codec=None)) | st.sampled_from(["\ud800", "\x00", "x" * 600, "", "UDRL_A", " udrl_a"]))
def test_nothing_but_the_key_itself_is_known(presented: str) -> None:
    assert KeyRing({"a": A, "b": B}).name_of(presented) is None


def test_every_entry_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda kept, shown: compared.append(kept) or real(kept, shown))
    assert KeyRing({"a": A, "b": B}).name_of("udrl_a") == "a"
    assert compared == [A, B]
