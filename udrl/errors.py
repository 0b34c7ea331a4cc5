"""Failures that the user caused, told in one line, with exit code 2."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something the user can mend. The message names the thing and the remedy, one line a problem."""


def exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run ``main`` and turn a :class:`UserError` into its lines on stderr and exit code 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0
