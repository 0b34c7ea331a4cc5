"""Write ``docs/recipe.md`` from the descriptions in ``udrl/recipe.py``: ``python -m scripts.recipe_reference``."""

import types
import typing
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from udrl.recipe import Engine, Placement, Recipe, Sampling, Section
from udrl.text import markdown_table

TARGET = Path(__file__).parents[1] / "docs" / "recipe.md"
# Sections that occur in many places; each place lists only the defaults in which it differs.
SHARED: tuple[type[Section], ...] = (Sampling, Engine, Placement)
INTRODUCTION = """\
# Recipe reference

One recipe is one run. Every key below can be set in the YAML file or on the command line as `dotted.key=value`
(`python -m jobs.train recipes/quickstart.yaml train.epochs=2`); `--print` shows the resolved recipe. A section that is given
in part keeps the other defaults of its place. An unknown key or a value out of range exits with code 2 and one line per
problem.

This page is generated from `udrl/recipe.py` by `make docs`; change the descriptions there."""


def section_type(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, or None for a value or a list."""
    kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def render() -> str:
    """Return the page: one table per section, in the order of the recipe."""
    parts = [INTRODUCTION, *_render_section(Recipe, "", Recipe.__doc__ or "", None)]
    for shared in SHARED:
        parts += [f"## {shared.__name__}", _plain(shared.__doc__ or ""), _table(shared, "", None)]
    return "\n\n".join(parts) + "\n"


def _render_section(section: type[Section], prefix: str, purpose: str, instance: Section | None) -> list[str]:
    parts = [f"## `{prefix.removesuffix('.')}`" if prefix else "## Top level", _plain(purpose)]
    if table := _table(section, prefix, instance):
        parts.append(table)
    for name, field in section.model_fields.items():
        own, item = section_type(field), _item_type(field)
        if (inner := own or item) and not issubclass(inner, SHARED):
            default = _default(name, field, instance)
            inner_prefix = f"{prefix}{name}." if own else f"{prefix}{name}.N."
            parts += _render_section(
                inner, inner_prefix, inner.__doc__ or "", default if isinstance(default, Section) else None
            )
    return parts


def _table(section: type[Section], prefix: str, instance: Section | None) -> str:
    """Return the table of a section's values; sections within it have tables of their own, except shared ones."""
    rows = []
    for name, field in section.model_fields.items():
        default, inner = _default(name, field, instance), section_type(field)
        if inner and issubclass(inner, SHARED):
            shared = next(kind for kind in SHARED if issubclass(inner, kind))
            link = f"[{shared.__name__}](#{shared.__name__.lower()})"
            rows.append([f"`{prefix}{name}`", link, _differing_defaults(default, shared), field.description or ""])
        elif not inner:
            rows.append([f"`{prefix}{name}`", _type_name(field), _default_text(default), field.description or ""])
    return markdown_table(["key", "value", "default", "meaning"], rows) if rows else ""


def _default(name: str, field: FieldInfo, instance: Section | None) -> Any:
    return getattr(instance, name) if instance is not None else field.get_default(call_default_factory=True)


def _differing_defaults(default: Section, shared: type[Section]) -> str:
    values = default.model_dump()
    differing = {name: value for name, value in values.items() if value != shared().model_dump()[name]}
    return f"`{{{', '.join(f'{name}: {_scalar(value)}' for name, value in differing.items())}}}`" if differing else ""


def _plain(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())


def _item_type(field: FieldInfo) -> type[Section] | None:
    items = typing.get_args(field.annotation)
    return next((item for item in items if isinstance(item, type) and issubclass(item, Section)), None)


def _type_name(field: FieldInfo) -> str:
    bounds = []
    for rule in field.metadata:
        for kind, sign, attribute in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(rule, kind):
                bounds.append(f"{sign} {getattr(rule, attribute):,}")
        if isinstance(rule, MinLen) and rule.min_length:
            bounds.append("not empty")
        if isinstance(rule, MaxLen):
            bounds.append(f"at most {rule.max_length} items")
    return ", ".join([_annotation_name(field.annotation), *bounds])


def _annotation_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, types.UnionType):
        return " or ".join(_annotation_name(argument) for argument in arguments)
    if origin is list:
        return f"list of {_annotation_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, list):
        return f"`[{', '.join(_item_text(item) for item in default)}]`"
    return f"`{_scalar(default)}`"


def _scalar(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _item_text(item: Any) -> str:
    if isinstance(item, Section):
        return "{" + ", ".join(f"{name}: {value}" for name, value in item.model_dump(exclude_unset=True).items()) + "}"
    return str(item)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
