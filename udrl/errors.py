"""Failures that are reported as one line: the user's, with exit code 2, and a stage that hangs, with 3."""

import sys
from collections.abc import Callable, Sequence

STALLED_EXIT_CODE = 3  # exit code of a stage that made no progress


class UserError(Exception):
    """Something the user can mend. The message names the thing and the remedy, one line a problem."""


class StalledError(Exception):
    """A stage made no progress for too long and was ended."""


def exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run ``main``; print a :class:`UserError` as one line per problem and return 2, return 3 for a :class:`StalledError`."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except StalledError as error:
        print(f"error: {error}", file=sys.stderr)
        return STALLED_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0
