"""A local command opens no socket, and says nothing on stderr when it is to be quiet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_trained

COMMANDS = {
    "average": ["average", "run", "--last", "2", "-o", "out", "--quiet"],
    "torch": ["average", "run", "--last", "2", "-o", "out", "--quiet", "--memory", "64MiB"],
    "sweep": ["sweep", "run", "--method", "sma,wma", "-o", "sweep", "--quiet"],
    "verify": ["verify", "done", "--against-inputs", "--quiet"],
    "inspect": ["inspect", "run", "--json"],
}
AUDITED = """
import os, sys

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        os.write(2, f"{event} {arguments}".encode())
        os._exit(97)

sys.addaudithook(refuse)
from merge_cli.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    for step in (1000, 2000, 3000):
        write_trained(folder / "run" / f"ckpt_{step}", step)
    subprocess.run(
        [sys.executable, "-m", "merge_cli", "average", "run", "-o", "done", "--quiet"], cwd=folder, check=True, timeout=60
    )
    return folder


@pytest.fixture
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    kernel = {"PMERGE_KERNEL": "torch"} if "torch" in request.node.name else {}
    return {**os.environ, **kernel, "PYTHONWARNINGS": "default,ignore::DeprecationWarning:typer"}  # the lowest one


@pytest.mark.parametrize("command", COMMANDS)
def test_no_socket_is_opened_and_stderr_is_empty(command: str, place: Path, environment: dict[str, str]) -> None:
    """In processes of their own: an audit hook cannot be removed, and strace traces a process."""
    shutil.rmtree(place / "out", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, *COMMANDS[command]], cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["average", "verify"])
def test_no_system_call_asks_for_a_socket(command: str, place: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    trace = ["strace", "-f", "-qq", "-e", "trace=socket,connect", "-o", str(tmp_path / "calls")]
    if shutil.which("strace") is None or subprocess.run([*trace, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("strace is not there, or may not trace; the audit hook sees what Python does")
    shutil.rmtree(place / "out", ignore_errors=True)
    subprocess.run(
        [*trace, sys.executable, "-m", "merge_cli", *COMMANDS[command]], cwd=place, env=environment, check=True, timeout=120
    )
    assert (tmp_path / "calls").read_text() == ""


def test_the_hook_would_notice() -> None:
    program = AUDITED.split("from merge_cli")[0] + "import socket; socket.socket()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 97 and done.stderr.startswith("socket.__new__")
