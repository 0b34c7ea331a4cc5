"""Bearer keys: creation, storage and verification; no message or log reveals a key or a hash."""

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import keys
from serve.keys import KeyRing, hash_key
from udrl.errors import UserError, exit_code

A, B = hash_key("udrl_a"), hash_key("udrl_b")


def _file(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = tmp_path / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


def test_a_new_key_is_found_by_name_and_the_file_holds_only_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    assert exit_code(keys.main, ["new", "team-a", "--file", str(path)]) == 0
    output = capsys.readouterr()
    key = output.out.removesuffix("\n")
    assert key.startswith("udrl_")
    assert len(key) == 48  # 32 bytes in base64
    assert "this once" in output.err
    assert key not in output.err
    assert path.read_text() == f"team-a:{hash_key(key)}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    ring = KeyRing.read(str(path), {})
    assert ring.find_name(key) == "team-a"
    assert ring.find_name(hash_key(key)) is None  # the stored hash is not a key


def test_without_a_file_the_entry_is_printed_for_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["new", "ci"])
    key, entry = capsys.readouterr().out.splitlines()
    assert KeyRing.read(None, {"UDRL_API_KEYS": entry}).find_name(key) == "ci"


def test_keys_are_different_each_time() -> None:
    assert len({keys.create_key("x", None)[0] for _ in range(100)}) == 100


def test_a_key_is_appended_to_a_file_whose_last_line_has_no_end(tmp_path: Path) -> None:
    path = _file(tmp_path, f"# ours\na:{A}")
    key, _ = keys.create_key("b", path)
    assert list(KeyRing.read(path, {}).entries) == ["a", "b"]
    assert KeyRing.read(path, {}).find_name(key) == "b"


def test_a_duplicate_name_leaves_the_file_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, f"a:{A}\n")
    assert exit_code(keys.main, ["new", "a", "--file", path]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "already" in output.err
    assert Path(path).read_text() == f"a:{A}\n"


@pytest.mark.parametrize("name", ["", "a:b", "a,b", "a b", "a#b", "a\n", "é", "x" * 65, "../a"])
def test_a_name_that_the_parser_would_reject_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name: not a valid name"):
        keys.create_key(name, str(tmp_path / "keys"))
    assert not (tmp_path / "keys").exists()


def test_of_two_processes_that_add_the_same_name_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"

    def other_process_appends(_file: object, operation: int) -> None:
        assert operation == keys.fcntl.LOCK_EX
        path.write_text(f"a:{A}\n")

    monkeypatch.setattr(keys.fcntl, "flock", other_process_appends)  # runs while this process waits for the lock
    with pytest.raises(UserError, match="already"):
        keys.create_key("a", str(path))
    assert path.read_text() == f"a:{A}\n"


def test_entries_are_separated_by_lines_or_commas_and_may_have_comments(tmp_path: Path) -> None:
    text = f"\ufeff# who\n\na:{A}  # the first\r\n b : {B.upper()} ,c:{hash_key('c')},\n"
    assert KeyRing.read(_file(tmp_path, text), {}).entries == {"a": A, "b": B, "c": hash_key("c")}


def test_the_environment_is_read_if_no_file_is_named(tmp_path: Path) -> None:
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
        (f"a:{A}\n\na:{B}", "line 3: duplicate name a"),
        (f"a:{A},b:{A}", "line 1: b has the same key as a"),
        ("# nothing\n", "has no entry"),
        ("", "is empty or not set"),
        (b"a:\xff\xfe", "not a text file"),
    ],
)
def test_a_malformed_file_is_reported_in_one_line_that_quotes_no_secret(
    tmp_path: Path, text: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(tmp_path, text)
    assert exit_code(keys.main, ["list", "--file", path]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert path in error
    assert "secretkey" not in error
    assert A[:-1] not in error


def test_a_missing_file_a_folder_and_an_empty_environment_are_reported(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(UserError, match="cannot be used"):
            KeyRing.read(path, {})
    with pytest.raises(UserError, match="cannot be used"):
        keys.create_key("a", str(tmp_path / "no" / "folder"))
    with pytest.raises(UserError, match=r"UDRL_API_KEYS is empty or not set; create a key with .*serve.require_keys=false"):
        KeyRing.read(None, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Permission denied"):
        KeyRing.read(_file(tmp_path, f"a:{A}", 0o000), {})


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o620, True)])
def test_a_file_that_other_users_can_read_or_change_causes_a_warning(
    tmp_path: Path, mode: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    KeyRing.read(_file(tmp_path, f"a:{A}", mode), {})
    assert ("chmod 600" in capsys.readouterr().err) == warned


def test_the_list_shows_only_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["list", "--file", _file(tmp_path, f"a:{A}\nb:{B}\n")])
    assert capsys.readouterr().out == "a\nb\n"


def test_a_key_ring_can_be_pickled_and_its_repr_has_no_hash() -> None:
    ring = pickle.loads(pickle.dumps(KeyRing({"a": A})))
    assert ring.find_name("udrl_a") == "a"
    assert A not in f"{ring!r} {ring}"


@given(st.text() | st.text(st.characters(codec=None)) | st.sampled_from(["\ud800", "\x00", "x" * 600, "", "UDRL_A", " udrl_a"]))
def test_only_the_exact_key_is_accepted(token: str) -> None:
    assert KeyRing({"a": A, "b": B}).find_name(token) is None


def test_every_entry_is_compared_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda stored, sent: compared.append(stored) or real(stored, sent))
    assert KeyRing({"a": A, "b": B}).find_name("udrl_a") == "a"
    assert compared == [A, B]
