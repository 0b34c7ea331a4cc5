"""`python -m jobs.train RECIPE [key=value ...]`: the train stage."""

import sys
from collections.abc import Sequence

from udrl.command_line import parse_recipe
from udrl.errors import exit_code


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Train the student by upside-down reinforcement learning, in rounds if the recipe has any.")
    from udrl.train import stage as train

    print(train.describe(train.run(recipe)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
