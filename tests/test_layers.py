"""Imports point downwards only, file by file and without a circle; the pure modules touch no file,
clock or screen.
"""

import ast
from functools import cache
from pathlib import Path

import pytest
from paths import PACKAGE, TESTS

LAYERS = [
    {"errors", "version", "names"},
    {"system"},
    {"stores"},
    {"formats"},
    {"request"},
    {"planning"},
    {"ranks"},
    {"engine"},
    {"tuning"},
    {"output"},
    {"job"},
    {"trajectory"},
    {"features"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
IMPURE_REQUESTS = tuple(f"request/{name}" for name in ("discovery", "destination", "screening", "candidates", "folders", "misses"))
PURE = ("request", "planning", "ranks/shares")
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    """The folder of the package, or the module of its top level, that a file belongs to."""
    return path.with_suffix("").parts[0]


@cache
def imports_of(path: Path) -> frozenset[str]:
    """The modules that a file imports, also inside functions or for types alone; `merge_cli` ones
    as paths of files.
    """
    tree = ast.parse((PACKAGE / path).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(file_of(f"{node.module}.{alias.name}") or file_of(node.module) for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(file_of(alias.name) for alias in node.names)
    return frozenset(found)


def file_of(module: str) -> str:
    """The file of a module of the package; other modules as they are; "" for a name that is no
    module of the package.
    """
    if module.split(".")[0] != "merge_cli":
        return module
    inside = Path(*module.split(".")[1:])
    return next((str(path) for path in (inside.with_suffix(".py"), inside / "__init__.py") if (PACKAGE / path).is_file()), "")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    own = place(path)
    for module in imports_of(path):
        if module.endswith(".py"):
            other = place(Path(module))
            assert LEVEL[other] < LEVEL[own] or other == own, f"{path} imports {module}"
        if own != "cli":
            assert module.split(".")[0] not in ("typer", "rich"), f"{path} imports {module}"
        if str(path).startswith(PURE) and not str(path).startswith(IMPURE_REQUESTS):
            assert module.split(".")[0] not in ("os", "time", "socket", "torch"), f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_imports_itself_by_way_of_others(path: Path) -> None:
    seen: dict[str, str] = {}
    todo = [str(path)]
    while todo:
        here = todo.pop()
        for module in imports_of(Path(here)):
            if module.endswith(".py") and module not in seen:
                seen[module] = here
                todo.append(module)
    way, at = [str(path)], seen.get(str(path))
    while at is not None and at != str(path):
        way.append(at)
        at = seen.get(at)
    assert str(path) not in seen, f"a circle: {' <- '.join(way)}"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_imports_another(path: Path) -> None:
    """Several modules share helpers in tests/helpers, which pytest finds by its settings alone."""
    tree = ast.parse(path.read_text())
    imported = [each.module or "" for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)]
    imported += [alias.name for each in ast.walk(tree) if isinstance(each, ast.Import) for alias in each.names]
    assert not [module for module in imported if module.rpartition(".")[2].startswith(("test_", "conftest"))]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]
