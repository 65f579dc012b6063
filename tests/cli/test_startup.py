"""The modules that an average does not wait for. Processes are started, as imports count only in a
fresh one.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_trained

from merge_cli.cli.app import COMMANDS

HEAVY = {
    *("torch", "numpy", "safetensors", "huggingface_hub", "transformers", "obstore"),  # a tenth of a second and more each
    *("rich", "ssl", "http", "urllib.request", "asyncio", "multiprocessing", "sqlite3", "xml", "unittest"),
    *("merge_cli.trajectory", "merge_cli.stores.hub", "merge_cli.stores.object_store", "merge_cli.stores.http"),
}
CODE = """
import sys
try:
    from merge_cli.__main__ import main
    main()
finally:
    print(*sorted(sys.modules), sep="\\n", file=open("modules", "w"))
"""


@pytest.mark.parametrize("more", [["-o", "out"], ["--dry-run"], ["--dry-run", "--json"]], ids=" ".join)
def test_an_average_imports_nothing_heavy_and_no_other_command(tmp_path: Path, more: list[str]) -> None:
    for step in (1000, 2000):
        write_trained(tmp_path / f"checkpoint-{step}", step)
    arguments = ["average", "checkpoint-1000", "checkpoint-2000", *more]
    subprocess.run([sys.executable, "-c", CODE, *arguments], cwd=tmp_path, check=True, timeout=120, capture_output=True)
    modules = (tmp_path / "modules").read_text().split()
    others = {f"merge_cli.cli.{name}" for name in COMMANDS if name != "average"}
    assert "merge_cli.cli.average" in modules
    assert [name for name in modules if any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY | others)] == []
