"""`python -m jobs.generate RECIPE [key=value ...]`: the generate stage."""

import sys
from collections.abc import Sequence

from udrl.command_line import parse_recipe
from udrl.errors import UserError, exit_code


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Stream intents through the teacher into scored episodes.", allow_dry_run=True)
    if recipe.episodes_from:
        raise UserError(f"episodes_from: nothing to generate; the episodes are those of {recipe.episodes_from}")
    from udrl.generate import dry_run
    from udrl.generate import stage as generate

    print("\n".join(dry_run.run(recipe)) if recipe.dry_run else generate.describe(generate.run(recipe)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
