"""The screen: words are whole, tables fit, at 80 and at 140 columns of a real terminal."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import write_trained
from command import pmerge

from merge_cli.cli.layout import bar, common_folder, table, without_empty, wrap

LONG = "a_folder/of_experiments/with_a_long_name/seed_17"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    for step in range(1000, 11000, 1000):
        write_trained(folder / LONG / f"ckpt_{step}", step)
    return folder


PMERGE = (sys.executable, "-m", "merge_cli")


def on_terminal(columns: int, *arguments: str, cwd: Path, program: Sequence[str] = PMERGE) -> list[str]:
    """The lines that a terminal of that width shows, stdout and stderr together. It starts a
    process, as a terminal belongs to one.
    """
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen([*program, *arguments], cwd=cwd, stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    read = bytearray()
    try:
        while part := os.read(here, 4096):
            read += part
    except OSError:  # the terminal is closed at the other end
        pass
    os.close(here)
    assert process.wait(timeout=60) == 0, read.decode()
    return [line.split("\r")[-1] for line in read.decode().replace("\r\n", "\n").split("\n")]


COMMANDS = {
    "average": ("average", LONG, "--method", "ema", "--alpha", "0.1", "--dry-run", "--device", "cpu"),
    "sweep": ("sweep", LONG, "--method", "sma,ema:0.1,wma", "--last", "2,10", "--dry-run", "--device", "cpu"),
    "inspect": ("inspect", LONG),
}


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_words_are_whole_and_lines_fit(columns: int, command: str, place: Path) -> None:
    lines = on_terminal(columns, *COMMANDS[command], cwd=place)
    assert [line for line in lines if len(line) > columns] == []
    piped = pmerge(*COMMANDS[command], cwd=place)
    words = {word for line in (piped.stdout + piped.stderr).splitlines() for word in line.split()}
    shown = {word for line in lines for word in line.split()}
    new = {word for word in shown - words if not any(mark in word for mark in ("MB/s", "kB/s", "GB/s")) and not word[0].isdigit()}
    assert new == set(), "every word of a terminal is one of the whole text"
    text = "\n".join(lines)
    assert text.count(LONG) <= 2, "the common folder is shown once, and once with the side files"
    assert "experts" not in text and "quantization" not in text, "columns without content are left out"
    assert "intervals" not in text
    if command == "average":
        assert "ckpt_10000  10000       0.1000  █" in text


MEASURE = """case $1 in step-*) loss=2.0$(expr 30000 - ${1#step-});; *last6*) loss=1.971;; *) loss=1.976;; esac
echo "{\\"loss\\": $loss}"
"""
OTHERS = (
    f"analyze {LONG} --last 10 -o eval",
    f"evaluate {LONG} --command 'sh measure.sh {{name}} {{path}}' -o eval",
    f"forecast {LONG} -o eval",
    f"average {LONG} --last 3 -o out --quiet",
    "verify out --against-inputs",
    "methods",
    f"watch {LONG} --once --settle 0 --since 9000 --last 3 -o watched",
)


def with_the_run(folder: Path, place: Path) -> Path:
    (folder / LONG).parent.mkdir(parents=True)
    (folder / LONG).symlink_to(place / LONG)
    (folder / "measure.sh").write_text(MEASURE)
    return folder


@pytest.mark.parametrize(
    "columns", [80, pytest.param(140, marks=pytest.mark.slow(reason="seven processes; at 80 columns the same lines are broken"))]
)
def test_what_other_commands_print_fits_too(columns: int, place: Path, tmp_path: Path) -> None:
    """One terminal for all of them: each command is a process."""
    here, elsewhere = with_the_run(tmp_path / "terminal", place), with_the_run(tmp_path / "pipe", place)
    script = " && ".join(f"{sys.executable} -m merge_cli {each}" for each in OTHERS)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in on_terminal(columns, "-c", script, cwd=here, program=("sh",))]
    too_long = [line for line in lines if len(line) > columns and len(line.split()) > 1]
    assert [line for line in too_long if not line.strip().startswith("pmerge ")] == [], "only commands are kept whole"
    piped = [pmerge(*shlex.split(each), cwd=elsewhere) for each in OTHERS]
    words = {word for done in piped for word in (done.stdout + done.stderr).split()}
    shown = {word for line in lines if "━" not in line for word in line.split()}  # a line with the bar is of no pipe
    assert {word for word in shown - words if not word[0].isdigit()} == set()
    assert "best merge" in "\n".join(lines), "the forecast has all its tables"


def test_the_first_line_of_a_terminal_is_there_at_once(place: Path) -> None:
    here, there = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "merge_cli", *COMMANDS["average"]], cwd=place, stdout=there, stderr=there)
    os.close(there)
    assert os.read(here, 4096).startswith(b"reading headers ...")
    os.close(here)
    process.wait(timeout=60)


def test_warnings_that_differ_in_numbers_only_come_once(place: Path) -> None:
    done = pmerge("sweep", LONG, "--method", "sma,wma", "--last", "2,9,10", "--dry-run", cwd=place)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2 and all("more output" in line for line in warnings), warnings


def test_lines_are_broken_between_words_and_commands_are_whole() -> None:
    line = "  warning: " + "several words " * 10
    assert [len(part) <= 50 for part in wrap(line, 50)] == [True] * len(wrap(line, 50))
    assert " ".join(part.strip() for part in wrap(line, 50)) == line.strip()
    assert wrap("x" * 100, 50) == ["x" * 100] and wrap(line, None) == [line]
    command = "pmerge average " + " ".join(f"run/ckpt_{n}" for n in range(9))
    assert wrap(f"hint: name them in their order:  {command}", 60) == ["hint: name them in their order:", f"  {command}"]


def test_a_table_leaves_out_what_is_optional_or_empty() -> None:
    header, rows = ("name", "n", "more"), [("a" * 20, "1", "b" * 30), ("c", "22", "")]
    assert [len(line) for line in table(header, rows, width=80)] == [32, 58, 26]
    assert table(header, [("a", "+1*", "b c d e f g h i j k l m n o"), ("b", "", "")], width=38) == [
        "  name    n  more",
        "  a     +1*  b c d e f g h i j k l m n",
        "             o",
        "  b",
    ]
    assert table(header, rows, width=40, optional=("more",)) == [f"  {'name':20}   n", f"  {'a' * 20}   1", f"  {'c':20}  22"]
    assert without_empty(header, rows, {"1", "22"}) == (["name", "more"], [["a" * 20, "b" * 30], ["c", ""]])


def test_folders_and_bars() -> None:
    assert common_folder(["a/b/c/1", "a/b/d/1"]) == "a/b"
    assert common_folder(["/run/1", "/run/2"]) == "/run" and common_folder(["1", "2"]) == common_folder(["a/1"]) == ""
    assert common_folder(["hf://org/model@1", "hf://org/model@2"]) == "hf://org"
    assert common_folder(["hf://a/m@1", "hf://b/m@2"]) == ""
    assert (bar(0.5, 1, "utf-8"), bar(0.5, 1, "ascii"), bar(-1, 1, "utf-8"), bar(1e-9, 1, None)) == ("█" * 10, "#" * 10, "", "#")
