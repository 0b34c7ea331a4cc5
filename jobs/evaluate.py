"""`python -m jobs.evaluate RECIPE [key=value ...]`: the evaluate stage."""

import sys
from collections.abc import Sequence

from udrl.command_line import parse_recipe
from udrl.errors import exit_code


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Evaluate the student against its teacher on held-out intents.")
    from udrl.evaluate import stage as evaluate

    print(evaluate.describe(evaluate.run(recipe)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
