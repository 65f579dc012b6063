"""Imports point downwards only, and the pure modules touch no file, clock or screen."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "merge_cli"
LAYERS = [
    {"errors", "version"},
    {"methods", "formats"},
    {"selection", "plan", "grid"},
    {"agreement", "cluster"},
    {"planner"},
    {"engine"},
    {"output"},
    {"trajectory"},
    {"averaging", "inspection"},
    {"verification", "sweeping", "sharing"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imports_of(path):
        if module.startswith("merge_cli."):
            other = module.split(".")[1]
            assert LEVEL[other] < LEVEL[own] or other == own, f"{path.name} imports {module}"
        if own != "cli":
            assert module.split(".")[0] not in ("typer", "rich"), f"{path.name} imports {module}"
        if own in ("methods", "plan", "agreement", "planner"):
            assert module.split(".")[0] not in ("os", "time", "socket", "torch"), f"{path.name} imports {module}"
