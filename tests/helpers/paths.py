"""Where things of the repository lie, for tests in any folder."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "merge_cli"
SCRIPTS = REPOSITORY / "scripts"
LIB = SCRIPTS / "lib"
TESTS = REPOSITORY / "tests"
