"""`python -m jobs.evaluate RECIPE [key=value ...]`: the evaluate stage."""

import sys
from collections.abc import Sequence

from udrl.errors import exit_code
from udrl.recipe import from_command_line


def main(argv: Sequence[str]) -> None:
    recipe = from_command_line(argv, "Evaluate the student against its teacher on held-out intents.")
    from udrl.evaluate import stage as evaluate

    print(evaluate.describe(evaluate.run(recipe)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
