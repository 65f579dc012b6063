"""Prose is at most 100 columns wide; tables may be wider."""

import ast
import re
from pathlib import Path

import pytest
from paths import REPOSITORY

COLUMNS = 100
FOLDERS = ("merge_cli", "scripts", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
DOCUMENTS = sorted(path for folder in (REPOSITORY, REPOSITORY / "docs") for path in folder.glob("*.md"))
HAS_COLUMNS = re.compile(r"\S {2,}\S")


def prose_of(path: Path) -> dict[int, str]:
    lines = path.read_text().split("\n")
    if max(map(len, lines)) <= COLUMNS:
        return {}
    own = {number for number, line in enumerate(lines, 1) if line.lstrip().startswith("# ")}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            own.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return {number: lines[number - 1].removesuffix('"""') for number in sorted(own)}


def too_wide(lines: dict[int, str]) -> list[str]:
    wide = {number: line for number, line in lines.items() if len(line) > COLUMNS}
    return [f"{number}: {line}" for number, line in wide.items() if not HAS_COLUMNS.search(line) and "# ---" not in line]


def test_docstrings_and_comments() -> None:
    assert {str(path): wide for path in SOURCES if (wide := too_wide(prose_of(path)))} == {}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents(path: Path) -> None:
    fenced, lines = False, {}
    for number, line in enumerate(path.read_text().split("\n"), 1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith(("|", "    ")):
            lines[number] = line
    assert too_wide(lines) == []
