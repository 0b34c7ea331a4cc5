"""Bearer keys: making, keeping and knowing them again. ``python -m serve.keys new NAME --file PATH`` makes one.

What is kept is ``name:sha256hex``, one entry a line or between commas, in a file (where ``#`` begins a comment) or in the
environment variable UDRL_API_KEYS. The key itself is shown once and kept nowhere. It is 32 random bytes, which nobody guesses
however fast the hash is: plain SHA-256 is right here, and a slow password hash would only slow each request down.
"""

import argparse
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from udrl.errors import UserError, exit_code

VARIABLE = "UDRL_API_KEYS"
PREFIX = "udrl_"  # secret scanners and people recognise a key that leaked by it

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LONGEST = 512  # of what is presented; ours have 48 characters


class KeyRing:
    """The keys that are known, by name. Its repr shows no hash.

    Args:
        entries: name -> SHA-256 of the key, as 64 lower-case hex digits.
    """

    def __init__(self, entries: dict[str, str]) -> None:
        self.entries = dict(entries)

    def __repr__(self) -> str:
        return f"KeyRing({len(self.entries)} keys)"

    @classmethod
    def read(cls, path: str | None, environ: Mapping[str, str]) -> "KeyRing":
        """The keys of the file at ``path``, or where that is None, of UDRL_API_KEYS.

        Raises:
            UserError: no key is there, the file can't be read, or an entry is malformed or there twice.
        """
        if path is None:
            text, place = environ.get(VARIABLE, ""), VARIABLE
        else:
            text, place = _read(path), path
        entries = parse(text, place)
        if not entries:
            where = f"{place} holds none" if text else f"{place} is empty or not set"
            raise UserError(
                f"keys: {where}; make one with `python -m serve.keys new NAME --file PATH` and set serve.keys_file=PATH,"
                " or serve only this machine with serve.require_keys=false"
            )
        return cls(entries)

    def name_of(self, presented: str) -> str | None:
        """The name of the key that ``presented`` is; None: it is none of them.

        Every entry is compared, and in constant time: how long it takes tells nothing about the keys.
        """
        if len(presented) > _LONGEST:
            return None
        shown, found = digest(presented), None
        for name, kept in self.entries.items():
            if hmac.compare_digest(kept, shown):
                found = name
        return found


def digest(key: str) -> str:
    """SHA-256 of a key, in hex. Takes any string, lone surrogates too: what is presented may be anything."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse(text: str, place: str) -> dict[str, str]:
    """Name -> hash of the entries in ``text``; ``place`` is what error messages call it.

    Raises:
        UserError: an entry is malformed, or a name or a key stands there twice. Entries are never quoted, since a plain key may
            have been pasted in their place.
    """
    entries: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for part in line.split("#", 1)[0].split(","):
            entry = part.strip()
            if not entry:
                continue
            name, _, kept = (piece.strip() for piece in entry.partition(":"))
            kept = kept.lower()
            at = f"{place}, line {number}"
            if not _NAME.fullmatch(name) or not _HASH.fullmatch(kept):
                raise UserError(f"{at}: expected name:hash, the entry that `python -m serve.keys new NAME` makes, not the key")
            if name in entries:
                raise UserError(f"{at}: the name {name} stands there twice; remove or rename one")
            for other, known in entries.items():
                if known == kept:
                    raise UserError(f"{at}: {name} has the same key as {other}; remove one")
            entries[name] = kept
    return entries


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            _warn_if_open(path, file)
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: OSError | UnicodeDecodeError) -> UserError:
    reason = "not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror or error
    return UserError(f"keys file {path}: can't be used ({reason}); name another, or make it with `python -m serve.keys new`")


def _warn_if_open(path: str, file: TextIO) -> None:
    # The hashes give no key away, but the names do leak, and whoever can write here lets himself in.
    if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o066:
        print(f"warning: keys file {path}: other users can read or change it; chmod 600 {path}", file=sys.stderr)


def new(name: str, path: str | None) -> tuple[str, str]:
    """A fresh key and its entry, which is appended to the file at ``path`` where one is given (made with mode 0600).

    Raises:
        UserError: the name is malformed or taken, or the file can't be used.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"name {name!r}: 1 to 64 letters, digits, dots, underscores and dashes")
    key = PREFIX + secrets.token_urlsafe(32)
    entry = f"{name}:{digest(key)}"
    if path is not None:
        try:
            _append(path, name, entry)
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(path, error) from error
    return key, entry


def _append(path: str, name: str, entry: str) -> None:
    made = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with open(made, "r+", encoding="utf-8-sig") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two at once must not both find the name free
        _warn_if_open(path, file)
        text = file.read()
        if name in parse(text, path):
            raise UserError(f"keys file {path}: has a key named {name} already; remove its line, or take another name")
        # In one write, and not after a line that somebody left without its end.
        os.write(made, f"{'' if not text or text.endswith(chr(10)) else chr(10)}{entry}\n".encode())


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description="Keys that clients of the server send.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("new", help="make a key; standard output gets the key, and without --file its entry")
    making.add_argument("name", help="who it is for; stands in logs and metrics")
    making.add_argument("--file", help="file that the entry is appended to, for serve.keys_file")
    listing = commands.add_parser("list", help="the names of the keys")
    listing.add_argument("--file", help=f"file of entries; default: ${VARIABLE}")
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        print("\n".join(KeyRing.read(arguments.file, os.environ).entries))
        return
    key, entry = new(arguments.name, arguments.file)
    print(f"The key of {arguments.name}. It is shown this once and kept nowhere:", file=sys.stderr, flush=True)
    print(key, flush=True)
    if arguments.file is None:
        print(f"Its entry, for serve.keys_file or {VARIABLE}:", file=sys.stderr, flush=True)
        print(entry)
    else:
        print(f"Its entry is in {arguments.file}; a server that runs takes it up when it is deployed again.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(main))
