"""`python -m jobs.pipeline RECIPE [key=value ...]`: generate, train and evaluate, one after the other, on one cluster."""

import sys
import time
from collections.abc import Sequence

from udrl.command_line import parse_recipe
from udrl.errors import exit_code


def main(argv: Sequence[str]) -> None:
    recipe = parse_recipe(argv, "Run generate, train and evaluate of one recipe.")
    from udrl import progress
    from udrl.evaluate import stage as evaluate
    from udrl.generate import stage as generate
    from udrl.train import stage as train

    times = []
    for name, stage in (("generate", generate), ("train", train), ("evaluate", evaluate)):
        if stage is generate and recipe.episodes_from:
            print(f"generate: skipped; the episodes are those of {recipe.episodes_from}", flush=True)
            continue
        start = time.monotonic()
        result = stage.run(recipe)
        times.append(f"{name} {progress.duration(time.monotonic() - start)}")
        print(stage.describe(result), flush=True)
    print(f"took: {', '.join(times)}")
    print(f"serve the student: python -m serve.app {recipe_argument(argv)}")


def recipe_argument(argv: Sequence[str]) -> str:
    """Return the command line's arguments: the recipe with the same overrides names the same run."""
    return " ".join(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
