"""`pmerge verify --against-inputs` of results that somebody changed and whose `pmerge.json` fits
again: its sha256 is a checksum, which anybody can compute.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import INDEX, nasty_run
from forging import record_again, reseal

from merge_cli import average, verify

Change = Callable[[Path], object]
LAST = "model-00003-of-00003.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its average `out`."""
    place = tmp_path_factory.mktemp("forged")
    average(nasty_run(place / "run", layout="sharded"), place / "out", method="ema", alpha=0.3)
    return place


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A copy of the average that may be changed."""
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def problems(out: Path, sample: int | None = 1) -> str:
    return "\n".join(verify(out, against_inputs=True, sample=sample).problems)


def test_a_changed_bit_anywhere_is_found(out: Path) -> None:
    """In values, headers, index and side files, after the record was made to fit."""
    rng = random.Random(0)
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        for position in rng.sample(range(len(data)), 5) if path.name != "pmerge.json" else ():
            changed = bytearray(data)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            record_again(out)
            assert path.name in problems(out, sample=None), f"{path.name}: bit flip at byte {position}"
        path.write_bytes(data)
    record_again(out)
    assert problems(out, sample=None) == ""


def in_header(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """A change of the last shard's header, whose length stays."""

    def rewrite(out: Path) -> None:
        data = (out / LAST).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(change(json.loads(data[8 : 8 + length])), separators=(",", ":")).encode().ljust(length)
        assert len(header) == length
        (out / LAST).write_bytes(data[:8] + header + data[8 + length :])

    return rewrite


def exchanged(header: dict[str, Any]) -> dict[str, Any]:
    """Two tensors of one dtype and shape have exchanged their names."""
    alike: dict[str, str] = {}
    for name, entry in header.items():
        kind = str((entry.get("dtype"), entry.get("shape")))
        if kind in alike:
            one = alike[kind]
            return {{name: one, one: name}.get(each, each): value for each, value in header.items()}
        alike[kind] = name
    raise AssertionError("no two tensors are alike")


def without_a_shard(out: Path) -> None:
    (out / LAST).unlink()
    index = json.loads((out / INDEX).read_bytes())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != LAST}
    (out / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (in_header(exchanged), f"{LAST}: its header is not the one that its inputs give: `"),
        (
            in_header(lambda h: {name: {**e, "dtype": "F16"} if e.get("dtype") == "BF16" else e for name, e in h.items()}),
            "BF16",
        ),
        (in_header(lambda h: {**h, "__metadata__": {"format": "tf"}}), "its metadata or the order differs"),
        (without_a_shard, f"{LAST}: its inputs give this file, and pmerge.json does not list it"),
        (lambda out: (out / INDEX).unlink(), f"{INDEX}: its inputs give this index, and pmerge.json does not list it"),
        (lambda out: (out / "config.json").write_text('{"auto_map": {"AutoModel": "evil.M"}}'), "config.json: is not"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json exists, and pmerge.json does not list it"),
        (lambda out: (out / "evil.py").write_text("import os"), "evil.py: pmerge.json lists it, and"),
        (lambda out: shutil.copy(out / LAST, out / "more.safetensors"), "more.safetensors: pmerge.json lists these weights"),
    ],
    ids=["names", "dtype", "metadata", "shard", "index", "config", "tokenizer", "code", "weights"],
)
def test_files_that_are_not_those_of_the_inputs_are_found(out: Path, change: Change, text: str) -> None:
    change(out)
    record_again(out)
    assert text in problems(out)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "wma", "parameters": {}}, "method wma with its parameters does not give these coefficients"),
        ({"parameters": {"alpha": 0.4}}, "method ema with its parameters does not give these coefficients"),
        ({"method": "power", "parameters": {"sigma_rel": 9.0}}, "cannot be used: --sigma-rel is out of range"),
        ({"nonfinite": {"lm_head.weight": 7}}, "`nonfinite` counts"),
        ({"nonfinite": {"ghost": 7}}, "`nonfinite` counts in `ghost`, which is no tensor of the result"),
        ({"nonfinite": []}, "does not describe a run"),
    ],
)
def test_a_record_that_does_not_fit_itself_is_found(out: Path, fields: dict[str, Any], text: str) -> None:
    reseal(out, **fields)
    assert text in problems(out, sample=None)


def test_a_step_is_compared_with_the_trainer_state_of_its_input(tmp_path: Path) -> None:
    run = nasty_run(tmp_path / "run", layout="sharded")
    for step, path in enumerate(run, 500):
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    out = tmp_path / "out"
    average(run, out)
    inputs = json.loads((out / "pmerge.json").read_bytes())["inputs"]
    newest = inputs[-1]["step"]
    assert problems(out) == ""
    inputs[-1]["step"] += 1
    reseal(out, inputs=inputs)
    assert f"`step` of {inputs[-1]['path']} is {newest + 1}, and it is step {newest}" in problems(out)
    inputs[-1]["step"] = "newest"
    reseal(out, inputs=inputs)
    assert "does not describe a run" in problems(out)


@pytest.mark.parametrize("single", [False, True], ids=["folders", "files"])
def test_steps_in_the_names_of_links_are_taken_from_the_record(tmp_path: Path, single: bool) -> None:
    """The record has the paths that the links lead to, whose names have other steps."""
    run = nasty_run(tmp_path / "run", layout="single")
    links = []
    for step, path in enumerate(run, 11):
        links.append(tmp_path / "links" / f"step_{step}" / ("model.safetensors" if single else ""))
        links[-1].parent.mkdir(exist_ok=True, parents=True)
        links[-1].symlink_to(path / "model.safetensors" if single else path)
        if single:
            (path / "trainer_state.json").write_text('{"global_step": 7}')
    average(links, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pmerge.json").read_bytes())["inputs"][0]["step"] == 11
    assert problems(tmp_path / "out") == ""


@pytest.mark.parametrize("name", ["processor_config.json", "template.jinja", "vocab.txt", "chat_templates/tool.jinja"])
def test_a_file_that_a_base_would_give_and_nobody_recorded_is_found(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    (out / "README.md").write_text("the card that push writes")
    (out / "logs").mkdir()
    (out / "logs" / "eval.json").write_text("{}")
    assert verify(out).ok
    found = verify(out, against_inputs=True, sample=1)
    assert found.problems == (f"{out / name}: its inputs do not give this file, and a loader may take it",)
    assert [Path(note.split(": ")[0]).name for note in found.notes] == ["README.md", "eval.json"]


def test_a_side_file_of_the_base_that_changed_since_is_named(out: Path, original: Path, tmp_path: Path) -> None:
    base = Path(json.loads((out / "pmerge.json").read_bytes())["base"])
    before = (base / "config.json").read_bytes()
    try:
        (base / "config.json").write_bytes(before + b" ")
        assert f"config.json: is not what {base / 'config.json'} gives; one of the two has changed" in problems(out)
    finally:
        (base / "config.json").write_bytes(before)
