"""Create, store and verify bearer keys. ``python -m serve.keys new NAME --file PATH`` creates one.

The server stores ``name:sha256hex``, one entry per line or separated by commas, in a file (``#`` begins a comment) or in the
environment variable UDRL_API_KEYS. The key itself is shown once and not stored. A key has 32 random bytes, so nobody can
guess it, however fast the hash is: plain SHA-256 suffices, and a slow password hash would only slow each request down.
"""

import argparse
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from udrl import logs
from udrl.errors import UserError, exit_code

log = logging.getLogger(__name__)

ENTRIES_VARIABLE = "UDRL_API_KEYS"
KEY_PREFIX = "udrl_"  # lets secret scanners and people recognize a leaked key

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_TOKEN_LENGTH = 512  # characters; our keys have 48


class KeyRing:
    """The valid keys. Its repr shows no hash.

    Args:
        entries: name -> SHA-256 of the key, as 64 lower-case hex digits.
    """

    def __init__(self, entries: dict[str, str]) -> None:
        self.entries = dict(entries)

    def __repr__(self) -> str:
        return f"KeyRing({len(self.entries)} keys)"

    @classmethod
    def read(cls, path: str | None, environ: Mapping[str, str]) -> "KeyRing":
        """Read the keys of the file at ``path``, or of UDRL_API_KEYS if that is None.

        Raises:
            UserError: there is no key, the file cannot be read, or an entry is malformed or duplicate.
        """
        if path is None:
            text, source = environ.get(ENTRIES_VARIABLE, ""), ENTRIES_VARIABLE
        else:
            text, source = _read_file(path), path
        entries = parse_entries(text, source)
        if not entries:
            problem = f"{source} has no entry" if text else f"{source} is empty or not set"
            raise UserError(
                f"keys: {problem}; create a key with `python -m serve.keys new NAME --file PATH` and set"
                " serve.keys_file=PATH, or serve only this machine with serve.require_keys=false"
            )
        return cls(entries)

    def find_name(self, token: str) -> str | None:
        """Return the name of the key that equals ``token``; None if it is unknown.

        Compares every entry in constant time, so that the response time reveals nothing about the keys.
        """
        if len(token) > _MAX_TOKEN_LENGTH:
            return None
        token_hash, match = hash_key(token), None
        for name, key_hash in self.entries.items():
            if hmac.compare_digest(key_hash, token_hash):
                match = name
        return match


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key in hex. Accepts any string, lone surrogates included: clients may send anything."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse_entries(text: str, source: str) -> dict[str, str]:
    """Return name -> hash of the entries in ``text``; error messages call it ``source``.

    Raises:
        UserError: an entry is malformed, or a name or a key occurs twice. Messages never quote an entry, because someone may
            have pasted a plain key.
    """
    entries: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for part in line.split("#", 1)[0].split(","):
            entry = part.strip()
            if not entry:
                continue
            name, _, key_hash = (piece.strip() for piece in entry.partition(":"))
            key_hash = key_hash.lower()
            location = f"{source}, line {number}"
            if not _NAME.fullmatch(name) or not _HASH.fullmatch(key_hash):
                raise UserError(
                    f"{location}: expected name:hash; use the entry that `python -m serve.keys new NAME` prints, not the key"
                )
            if name in entries:
                raise UserError(f"{location}: duplicate name {name}; remove or rename one of the two entries")
            for other_name, other_hash in entries.items():
                if other_hash == key_hash:
                    raise UserError(f"{location}: {name} has the same key as {other_name}; remove one of the two entries")
            entries[name] = key_hash
    return entries


def _read_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            _warn_if_exposed(path, file)
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable_file(path, error) from error


def _unusable_file(path: str, error: OSError | UnicodeDecodeError) -> UserError:
    reason = "not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror or error
    return UserError(
        f"keys file {path}: cannot be used ({reason}); name another one, or create it with `python -m serve.keys new`"
    )


def _warn_if_exposed(path: str, file: TextIO) -> None:
    # Hashes do not reveal keys, but names leak to readers, and anyone who can write the file can add a key.
    if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o066:
        log.warning("keys file %s: other users can read or change it; run chmod 600 %s", path, path)


def create_key(name: str, path: str | None) -> tuple[str, str]:
    """Return a new key and its entry; append the entry to the file at ``path``, which is created with mode 0600.

    Raises:
        UserError: the name is malformed or exists already, or the file cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"name: not a valid name ({name!r}); use 1 to 64 letters, digits, dots, underscores and dashes")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    entry = f"{name}:{hash_key(key)}"
    if path is not None:
        try:
            _append_entry(path, name, entry)
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable_file(path, error) from error
    return key, entry


def _append_entry(path: str, name: str, entry: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with open(descriptor, "r+", encoding="utf-8-sig") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two processes must not both see the name as free
        _warn_if_exposed(path, file)
        text = file.read()
        if name in parse_entries(text, path):
            raise UserError(f"keys file {path}: has a key named {name} already; remove its line, or use another name")
        # One write, on a new line even if the last line of the file has no end.
        os.write(descriptor, f"{'' if not text or text.endswith(chr(10)) else chr(10)}{entry}\n".encode())


def main(argv: Sequence[str]) -> None:
    logs.configure()
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description="Manage the keys of the server's clients.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="create a key; prints the key and, without --file, its entry")
    new.add_argument("name", help="name of the client, shown in logs and metrics")
    new.add_argument("--file", help="file to append the entry to, for serve.keys_file")
    listing = commands.add_parser("list", help="print the names of the keys")
    listing.add_argument("--file", help=f"file of entries; default: ${ENTRIES_VARIABLE}")
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        print("\n".join(KeyRing.read(arguments.file, os.environ).entries))
        return
    # Standard output carries only the key and the entry, for scripts; the explanations go to standard error.
    key, entry = create_key(arguments.name, arguments.file)
    print(f"The key of {arguments.name}. It is shown only this once and is not stored:", file=sys.stderr, flush=True)
    print(key, flush=True)
    if arguments.file is None:
        print(f"Its entry, for serve.keys_file or {ENTRIES_VARIABLE}:", file=sys.stderr, flush=True)
        print(entry)
    else:
        print(f"Its entry is in {arguments.file}; deploy a running server again to load it.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(main))
