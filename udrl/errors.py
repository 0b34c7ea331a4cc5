"""Failures that are told in one line: the user's, with exit code 2, and a stage that hangs, with 3."""

import sys
from collections.abc import Callable, Sequence

STALLED = 3  # exit code of a stage that made no progress


class UserError(Exception):
    """Something the user can mend. The message names the thing and the remedy, one line a problem."""


class Stalled(Exception):
    """A stage made no progress for too long and was ended."""


def exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run ``main`` and turn a :class:`UserError` into its lines on stderr and exit code 2, a :class:`Stalled` stage into 3."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except Stalled as error:
        print(f"error: {error}", file=sys.stderr)
        return STALLED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0
