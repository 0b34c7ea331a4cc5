"""Recipes from the command line: a YAML file and dotted overrides.

``load("recipes/quickstart.yaml", ["teacher.placement.replicas=4"])`` returns a :class:`~udrl.recipe.Recipe`.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import yaml

from udrl import logs
from udrl.errors import UserError
from udrl.recipe import Recipe, dump, from_values


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``dotted.key=value`` overrides (values are YAML).

    Raises:
        UserError: the file is absent or not YAML, or a key or value is not allowed.
    """
    try:
        with open(path, encoding="utf-8") as source:
            values = yaml.safe_load(source)
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror or error}; the shipped recipes are in recipes/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return from_values(values, path)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:  # absent, or a heading with nothing below it
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    target[last] = value


def parse_recipe(argv: Sequence[str], description: str, allow_dry_run: bool = False) -> Recipe:
    """Parse ``RECIPE [dotted.key=value ...]``; ``--print`` shows the resolved recipe and exits.

    Local storage paths become absolute. Only a job with ``allow_dry_run`` accepts ``dry_run``.

    Raises:
        UserError: the recipe can't be used.
    """
    parser = argparse.ArgumentParser(description=description, epilog="Overrides are YAML values: train.epochs=2")
    parser.add_argument("recipe", help="recipe file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and exit")
    logs.configure()
    arguments = parser.parse_intermixed_args(argv)  # --print may stand anywhere
    recipe = load(arguments.recipe, arguments.overrides)
    recipe = recipe.model_copy(
        update={"storage": _absolute(recipe.storage), "episodes_from": _absolute(recipe.episodes_from)},
    )
    if recipe.dry_run and not allow_dry_run:
        raise UserError("dry_run: only jobs.generate has a plan to show; run it there")
    if arguments.print:
        print(dump(recipe), end="")
        raise SystemExit(0)
    return recipe


def _absolute(uri: str | None) -> str | None:
    return uri if uri is None or "://" in uri else os.path.abspath(os.path.expanduser(uri))
