"""An option is one field of a spec, and a method one entry of METHODS: flags, Python calls and
records follow.

A copy of the package gets a made-up option and a made-up method, each in the one place where it
belongs, and is used in a process of its own. That process imports torch once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merge_cli
from merge_cli import plan_average
from merge_cli.planning.record import fingerprint

OPTION = '    flavor: str = option("plain", "Made up.", choices=("plain", "sweet"), synonyms={"sugary": "sweet"})\n'
METHOD = """    _method(
        "lean",
        summary="made up",
        formula="c_0 = slant",
        source="this test",
        function=lambda steps, slant: _inexact([slant, *[(1 - slant) / (len(steps) - 1)] * (len(steps) - 1)]),
        parameters={"slant": Parameter("made up", 0.25, metavar="X", read=_number)},
    ),
"""
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from merge_cli import average, finalize, plan_average, sweep, verify
from merge_cli.cli.app import make_app
from merge_cli.errors import PmergeError

def pmerge(*arguments):
    done = CliRunner().invoke(make_app(), list(map(str, arguments)))
    return done.stdout or str(done.exception)

def refused(call):
    try:
        call()
    except PmergeError as error:
        return str(error)

def manifest(folder):
    return json.load(open(f"{folder}/pmerge.json"))

found = {"help": pmerge("average", "--help")}
pmerge("average", "run", "-o", "typed", "--flavor", "sweet", "--quiet")
average("run", "plain")
average("run", "called", flavor="sweet")
for name in ("typed", "plain", "called"):
    found[name] = manifest(name)
found["wrong"] = refused(lambda: average("run", "wrong", flavor="sugary"))

from merge_cli.output.solo import SoloDestination
def begin(name, **options):
    plan = plan_average("run", name, **options)
    with SoloDestination(plan.output, plan.merge, plan.run) as destination:
        (destination.folder.checkpoint / "x.safetensors").write_bytes(b"")
        (destination.folder.records.folder / "x.json").write_text("{}")
begin("half", flavor="sweet")
found["resumed"] = refused(lambda: average("run", "half"))
found["finalized"] = refused(lambda: finalize("half"))

def verified(name):
    return verify(name, against_inputs=True).problems
found["verified"] = [verified("plain"), verified("called")]
from merge_cli.output.manifest import seal
changed = manifest("called") | {"flavor": "plain"}
changed.pop("sha256")
open("called/pmerge.json", "wb").write(seal(changed))
found["changed"] = verified("called")

pmerge("average", "run", "-o", "leaning", "--method", "lean", "--slant", "0.5", "--quiet")
found["leaning"] = manifest("leaning")
found["sweep"] = [path.name for path in sweep("run", "swept", methods=["lean", "lean:0.5"]).outputs]
found["methods"] = pmerge("methods", "lean", "--slant", "0.125")
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("once")
    shutil.copytree(Path(merge_cli.__file__).parent, place / "merge_cli", ignore=shutil.ignore_patterns("__pycache__"))
    insert(place / "merge_cli" / "request" / "spec.py", OPTION, before="    def __post_init__", after="class MergeSpec")
    insert(place / "merge_cli" / "request" / "methods.py", METHOD, before="    _method(", after="_ALL = (")
    for step in (1, 2, 3):
        (place / "run" / f"step_{step}").mkdir(parents=True)
        save_file({"w": torch.full((4,), float(step))}, place / "run" / f"step_{step}" / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "run": place / "run"}


def insert(path: Path, text: str, *, before: str, after: str) -> None:
    """Put `text` into a file, before the first `before` that follows `after`."""
    content = path.read_text()
    place = content.index(before, content.index(after))
    path.write_text(content[:place] + text + content[place:])


def test_an_option_has_a_flag_and_a_keyword(found: dict[str, Any]) -> None:
    assert "--flavor plain|sweet" in found["help"] and "[default: plain]" in found["help"]
    assert found["typed"]["flavor"] == found["called"]["flavor"] == "sweet"
    assert "--flavor cannot be 'sugary'" in found["wrong"] and "did you mean  --flavor sweet" in found["wrong"]


def test_an_option_is_recorded_and_part_of_the_fingerprint_unless_it_has_its_default(found: dict[str, Any]) -> None:
    assert found["plain"]["flavor"] == "plain"
    assert found["plain"]["plan"] != found["called"]["plan"] == found["typed"]["plan"]
    without = plan_average(found["run"]).merge
    assert found["plain"]["plan"] == fingerprint(without), "results from before the option keep their fingerprint"


def test_an_unfinished_run_is_continued_with_the_same_option_only(found: dict[str, Any]) -> None:
    assert re.search(r"request, flavor +was .?sweet.?, is .?plain", found["resumed"])
    assert "1 of 1 files" in found["finalized"], "finalize takes the option from the record"


def test_verify_plans_again_with_the_recorded_option(found: dict[str, Any]) -> None:
    assert found["verified"] == [[], []]
    assert "give another plan" in found["changed"][0]


def test_a_method_is_one_entry(found: dict[str, Any]) -> None:
    assert "--slant X" in found["help"] and "lean: made up [default: 0.25]" in found["help"]
    assert [each["coefficient"] for each in found["leaning"]["inputs"]] == [0.5, 0.25, 0.25]
    assert found["leaning"]["parameters"] == {"slant": 0.5}
    assert found["sweep"] == ["lean", "lean-0.5"]
    assert "0.1250 0.0972" in found["methods"]
