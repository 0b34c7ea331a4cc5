"""Measure how quickly a stranger can read this tree: ``python -m scripts.readability [FOLDER]``.

Prints a table and, as its last line, the same as JSON. ``tests/unit/test_style.py`` holds the gains.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

CODE = ("udrl", "serve", "jobs", "benchmarks")
PROSE = ("README.md", "AGENTS.md", "CHANGELOG.md", "docs")
# Bare participles that say what happened to a value instead of what it is.
PARTICIPLES = frozenset(
    (  # noqa: SIM905
        "asked believed called chosen counted drawn found given grown heard held judged kept known learned learnt made marked "
        "measured missed paired picked said scored sent settled shown sifted spoken taken told tried used varied wanted warned "
        "written"
    ).split()
)
MAY_REPEAT = frozenset({"__init__", "stage", "conftest"})
WHAT_CLAUSE = re.compile(r"\b[Ww]hat(?:'s)? (?:is|was|are|were|has|have|had|it|they|a|an|the|its|each|every|no|one)\b")
# Fenced blocks and code spans quote programs, some of them of earlier versions.
QUOTED = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
WHERE = re.compile(r"\b[Ww]here\b")


@dataclass(frozen=True)
class Readability:
    """The figures of one tree."""

    files: int
    code_lines: int
    participles_per_1000_lines: float
    found_assignments: int
    what_clauses_per_10000_words: float
    where_per_10000_words: float
    any_dicts_per_1000_lines: float
    files_with_one_importer_or_none: int
    modules_reached_by_generate: int
    modules_reached_by_train: int
    modules_reached_by_evaluate: int
    repeated_base_names: int


def measure(root: Path) -> Readability:
    """Measure the tree under ``root``, a checkout."""
    files = list(code_files(root))
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    lines = sum(source.count("\n") for source in sources.values())
    names = Counter(name for source in sources.values() for name in assigned_names(source))
    prose = [text for _, text in all_prose(root)]
    words = sum(len(text.split()) for text in prose)
    imports = import_graph(root)
    importers = Counter(target for targets in imports.values() for target in targets)
    library = [name for name in imports if name.startswith("udrl.") and not name.endswith("__main__")]
    return Readability(
        files=sum(path.name != "__init__.py" and path.relative_to(root).parts[0] == "udrl" for path in files),
        code_lines=lines,
        participles_per_1000_lines=round(1000 * sum(names[name] for name in PARTICIPLES) / lines, 1),
        found_assignments=names["found"],
        what_clauses_per_10000_words=round(1e4 * sum(len(WHAT_CLAUSE.findall(text)) for text in prose) / words, 1),
        where_per_10000_words=round(1e4 * sum(len(WHERE.findall(text)) for text in prose) / words, 1),
        any_dicts_per_1000_lines=round(1000 * sum(source.count("dict[str, Any]") for source in sources.values()) / lines, 1),
        files_with_one_importer_or_none=sum(importers[name] <= 1 for name in library),
        modules_reached_by_generate=len(reachable(imports, "jobs.generate")),
        modules_reached_by_train=len(reachable(imports, "jobs.train")),
        modules_reached_by_evaluate=len(reachable(imports, "jobs.evaluate")),
        repeated_base_names=len(repeated_base_names(root)),
    )


def code_files(root: Path, folders: tuple[str, ...] = CODE) -> Iterator[Path]:
    """Yield the Python files of the product, tests excluded."""
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def assigned_names(source: str) -> Iterator[str]:
    """Yield every variable and parameter name that the source binds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def code_prose(source: str) -> Iterator[str]:
    """Yield the comments, docstrings and other multi-word strings of Python source."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") > 2:
            yield node.value


def all_prose(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, text) for all comments, strings and documents of the tree."""
    for path in code_files(root):
        for text in code_prose(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(root)), text
    for name in PROSE:
        place = root / name
        for path in sorted(place.rglob("*.md")) if place.is_dir() else [place]:
            if path.exists():
                text = QUOTED.sub("", path.read_text(encoding="utf-8"))
                yield str(path.relative_to(root)), text


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return module -> modules of this project that it imports, packages resolved to the module that is named."""
    modules = {module_name(root, path): path for path in code_files(root, ("udrl", "jobs", "serve"))}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.add(inner if inner in modules else node.module)
        graph[name] = (targets & modules.keys()) - {name}
    return graph


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return the modules that importing ``start`` may reach, itself included."""
    pending, seen_modules = [start], {start}
    while pending:
        for target in graph.get(pending.pop(), ()):
            if target not in seen_modules:
                seen_modules.add(target)
                pending.append(target)
    return seen_modules


def repeated_base_names(root: Path) -> dict[str, list[str]]:
    """Return each base name that two files of the product share, with their paths."""
    places: dict[str, list[str]] = {}
    for path in code_files(root):
        if path.stem not in MAY_REPEAT:
            places.setdefault(path.stem, []).append(str(path.relative_to(root)))
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    figures = asdict(measure(root))
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {value:>8,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
