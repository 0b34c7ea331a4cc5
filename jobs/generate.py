"""`python -m jobs.generate RECIPE [key=value ...]`: the generate stage."""

import sys
from collections.abc import Sequence

from udrl.command_line import parse_recipe
from udrl.errors import UserError, exit_code


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Stream intents through the teacher into scored episodes.", allow_dry_run=True)
    if recipe.episodes_from:
        raise UserError(
            f"episodes_from: the episodes are those of another run ({recipe.episodes_from}), so there is nothing to generate;"
            " run jobs.train, or remove the key"
        )
    if recipe.dry_run:
        from udrl.generate import plan

        print(plan.describe_plan(plan.plan_generation(recipe)))
        return
    from udrl.generate import stage

    print(stage.describe(stage.run(recipe)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
