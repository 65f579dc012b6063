"""Names to steps, order and selection."""

import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_cli.errors import InputError, MismatchError, UsageError
from merge_cli.request import selection
from merge_cli.request.amounts import is_in_tokens, parse_amount
from merge_cli.request.candidates import read_candidate
from merge_cli.request.discovery import discover, find_candidates
from merge_cli.request.folders import is_checkpoint
from merge_cli.request.labels import Candidate, parse_label
from merge_cli.request.selection import Selected, check_steps, order_candidates, select_checkpoints
from merge_cli.request.spec import Selection
from merge_cli.stores.store import name_of


@pytest.mark.parametrize(
    ("name", "step", "stage", "ingredient"),
    [
        ("checkpoint-500", 500, None, None),
        ("ckpt_1000", 1000, None, None),
        ("step1000", 1000, None, None),
        ("step_1000", 1000, None, None),
        ("step-001000-2BT", 1000, None, None),
        ("global_step500", 500, None, None),
        ("iter_0001000", 1000, None, None),
        ("epoch=3-step=1200", 1200, None, None),
        ("step1000-tokens4B", 1000, None, None),
        ("stage1-step5000-tokens21B", 5000, "stage1", None),
        ("stage2-ingredient1-step11931-tokens50B", 11931, "stage2", "ingredient1"),
        ("ckpt_000", 0, None, None),
        ("0001000", 1000, None, None),
        ("model_step_70.safetensors", 70, None, None),
        ("900.pt", 900, None, None),
        ("ckpt_80.pth", 80, None, None),
        ("stage1-step90.bin", 90, "stage1", None),
        ("rng_state_0.pth", None, None, None),
        ("final", None, None, None),
        ("llama-7b", None, None, None),
        ("checkpoint-7b", None, None, None),
        ("step_1.5k", None, None, None),
        ("step" + "9" * 400, None, None, None),
        ("checkpoint-00001-of-00002.safetensors", None, None, None),
    ],
)
def test_names_in_the_wild(name: str, step: int | None, stage: str | None, ingredient: str | None) -> None:
    label = parse_label(name)
    assert (label.step, label.stage, label.ingredient) == (step, stage, ingredient)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("stage1-step5000-tokens21B", 21e9),
        ("step-001000-2BT", 2e9),
        ("step1000-tokens900M", 9e8),
        ("step928646-tokens4T", 4e12),
        ("olmo-7B-step1000", None),
        ("tokens5B", None),
        ("step1000", None),
    ],
)
def test_tokens_in_names(name: str, tokens: float | None) -> None:
    found = parse_label(name).tokens
    assert (None if found is None else found.number) == tokens


def named(*labels: str) -> list[Candidate]:
    found = [(name, parse_label(name)) for name in labels]
    return [Candidate(name, label.step, None, None, 0, tokens=label.tokens) for name, label in found]


OLMO = named(*(f"stage1-step{step}-tokens{math.ceil(step * 4_194_304 / 1e9)}B" for step in range(1000, 200_000, 1000)))


def test_names_give_the_tokens_of_a_step() -> None:
    selected = select_checkpoints(OLMO, Selection(every="100B", last=3), "sma")
    assert steps_of(selected.candidates) == [151_000, 175_000, 199_000]
    assert re.match(r"a step has 4,19\d,\d{3} tokens \(within [1-9],\d{3}\) by the names", selected.notes[0])
    assert steps_of(select_checkpoints(OLMO, Selection(last=2, every="2k"), "sma").candidates) == [197_000, 199_000]  # steps
    chosen = select_checkpoints(OLMO, Selection(before="500B", last=1, tokens_per_step=4_194_304), "sma")
    assert steps_of(chosen.candidates) == [119_000] and not [line for line in chosen.warnings if "--tokens-per-step" in line]
    chosen = select_checkpoints(OLMO, Selection(before="250B", last=1, tokens_per_step=2_097_152), "sma")
    assert "--tokens-per-step 2,097,152 is not what the names give: 4,19" in chosen.warnings[0]


def test_names_that_say_too_little_of_tokens() -> None:
    with pytest.raises(UsageError, match="the tokens in the names are too few"):
        select_checkpoints(OLMO[:3], Selection(every="10B"), "sma")
    with pytest.raises(UsageError, match="not in proportion to the steps"):
        select_checkpoints(named("step1000-tokens50B", "step2000-tokens60B"), Selection(every="10B"), "sma")
    with pytest.raises(UsageError, match="--every 10B is an amount of tokens"):
        select_checkpoints(run(1, 2), Selection(every="10B"), "sma")


def run(*steps: int) -> list[Candidate]:
    return [Candidate(f"ckpt_{step}", step, None, None, -step) for step in steps]


def steps_of(candidates: object) -> list[int | None]:
    return [candidate.step for candidate in candidates]  # type: ignore[attr-defined]


def select(candidates: list[Candidate], **options: object) -> Selected:
    return selection.select(candidates, Selection(**options))  # type: ignore[arg-type]


def test_order_is_by_number_or_as_asked() -> None:
    assert steps_of(order_candidates(run(10, 9, 100), "step", True)) == [9, 10, 100]
    assert steps_of(order_candidates(run(10, 9, 100), "given", True)) == [10, 9, 100]
    assert steps_of(order_candidates(run(10, 9, 100), "mtime", True)) == [100, 10, 9]
    with pytest.raises(MismatchError, match="2 checkpoints have step 9"):
        order_candidates(run(9, 10, 9), "step", True)


def test_every_takes_the_nearest_within_a_tenth_and_lists_gaps() -> None:
    here = run(1000, 2010, 2500, 2995, 4000)
    assert steps_of(select(here, every=1000).candidates) == [1000, 2010, 2995, 4000]
    assert steps_of(select(here, every=1000, last=2).candidates) == [2995, 4000]
    with pytest.raises(MismatchError, match="1 checkpoint is missing") as refused:
        select(run(1000, 3000, 4000), every=1000)
    assert "near step 2000" in str(refused.value)


def test_ranges_and_last() -> None:
    here = run(1, 2, 3, 4, 5)
    assert steps_of(select(here, from_step=2, to_step=4).candidates) == [2, 3, 4]
    assert steps_of(select(here, before=4, last=2).candidates) == [2, 3]
    with pytest.raises(UsageError, match="more checkpoints than there are"):
        select(here, last=6)


def test_amounts() -> None:
    assert [parse_amount(text) for text in ("500", "2k", "1_000")] == [500, 2000, 1000]
    assert parse_amount("8B", 4_000_000) == 2000
    with pytest.raises(UsageError, match="tokens"):
        parse_amount("8B")
    assert parse_amount("9007199254740993") == 2**53 + 1
    for text, tokens_per_step in [("1.5", None), ("9" * 400, None), ("1__0", None), ("8B", 0), ("2k", 4_000_000), ("", None)]:
        with pytest.raises(UsageError, match=r"--from|--tokens-per-step"):
            parse_amount(text, tokens_per_step, option="--from")


def test_only_a_suffix_means_tokens() -> None:
    assert [parse_amount(text, 4_000_000) for text in ("500", "10_000", "8M", "1T", 7)] == [500, 10_000, 2, 250_000, 7]
    assert [is_in_tokens(text) for text in ("500", "8B", " 8b ", None, 8, "")] == [False, True, True, False, False, False]
    assert [parse_amount("10M", 4_000_000, rounding=way) for way in (math.floor, math.ceil)] == [2, 3]
    with pytest.raises(UsageError, match="plain numbers:  --every 2000"):
        parse_amount("2k", 4_000_000)


def test_order_refuses_what_has_none() -> None:
    final = Candidate("final", None, None, None, 0)
    assert order_candidates([final, final], "step", False) == [final, final]
    assert steps_of(order_candidates([*run(10, 9), final], "step", False)) == [10, 9, None]
    with pytest.raises(MismatchError, match="no step is known for 1 of 3"):
        order_candidates([*run(10, 9), final], "step", True)
    with pytest.raises(MismatchError, match="same modification time"):
        order_candidates([final, Candidate("best", None, None, None, 0)], "mtime", True)


@pytest.mark.parametrize("order", ["step", "mtime"])
def test_stages_and_ingredients_are_mixed_only_when_told_to(order: str) -> None:
    first, second = Candidate("a", 1, "stage1", None, 0), Candidate("b", 2, "stage2", None, 1)
    with pytest.raises(MismatchError, match="different stages: stage1, stage2"):
        order_candidates([first, second], order, False)
    with pytest.raises(MismatchError, match="different ingredients"):
        order_candidates([first, Candidate("c", 2, "stage1", "ingredient1", 1)], order, False)
    assert order_candidates([second, first], "given", True) == [second, first]


def brute_force_every(steps: list[int], every: int, last: int | None) -> tuple[list[int], list[int]]:
    """Walk stride by stride: what is found, and the places where nothing is."""
    found: list[int] = []
    gaps: list[int] = []
    place = steps[-1]
    while (last is None or len(found) + len(gaps) < last) and 10 * (steps[0] - place) <= every:
        nearest = min(steps, key=lambda step: abs(step - place))
        (found if 10 * abs(nearest - place) <= every else gaps).append(nearest)
        place -= every
    return found[::-1], gaps


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=60, unique=True).map(sorted),
    st.integers(1, 90),
    st.none() | st.integers(1, 8),
)
def test_every_is_the_walk(steps: list[int], every: int, last: int | None) -> None:
    found, gaps = brute_force_every(steps, every, last)
    try:
        chosen = steps_of(select(run(*steps), every=every, last=last).candidates)
    except MismatchError as error:
        assert len(gaps) == int(error.message.split()[0])
    except UsageError as error:
        assert not gaps and last is not None and len(found) < last and f"--last {len(found)}" in str(error)
    else:
        assert not gaps and chosen == found


def test_every_is_quick_and_exact_for_far_apart_steps() -> None:
    with pytest.raises(MismatchError, match="999999999998 checkpoints are missing") as refused:
        select(run(1, 10**12), every=1)
    assert len(refused.value.details) == 4 and refused.value.hint.endswith("--every 999999999999")
    with pytest.raises(UsageError, match="order of their steps"):
        select(run(3000, 1000, 2000), every=1000)


def test_selection_without_steps_is_by_position() -> None:
    unnamed = [Candidate(name, None, None, None, 0) for name in "abc"]
    assert [c.path for c in select(unnamed, last=2).candidates] == ["b", "c"]
    for option in ("every", "from_step", "to_step", "before"):
        with pytest.raises(UsageError, match="need the step"):
            select(unnamed, **{option: 1})
    with pytest.raises(UsageError, match="leaves no checkpoint") as refused:
        select(run(1, 2), from_step=5, to_step=3)
    assert "from step 5, up to step 3" in str(refused.value) and "found     step 1, 2" in str(refused.value)
    with pytest.raises(UsageError, match="before step 1"):
        select(run(1, 2), before=1)
    with pytest.raises(UsageError, match="at least 1"):
        select(run(1, 2), last=0)


def checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files or ("model.safetensors",):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def found_in(*paths: Path, skipped: list[str] | None = None) -> list[str]:
    return [name_of(path) for path in discover(paths, None if skipped is None else skipped.append)]


@pytest.mark.parametrize(
    "rank",
    [
        "mp_rank_00",
        "mp_rank_00_001",
        "rank_0",
        "rank3",
        "tp0_pp1",
        "tp_rank_00_pp_rank_001",
        "ep_rank_3",
        "pp0",
        "ep-3",
    ],
)
def test_rank_folders_make_a_checkpoint(tmp_path: Path, rank: str) -> None:
    assert is_checkpoint(checkpoint(tmp_path / "step_5", f"{rank}/model.safetensors"))
    assert found_in(tmp_path) == found_in(tmp_path / "step_5") == ["step_5"]


def test_a_run_folder_gives_its_checkpoints_by_number(tmp_path: Path) -> None:
    for name in ("ckpt_10", "ckpt_9", "ckpt_100", ".hidden", "ckpt_11.pmerge-partial", "merged-sma-9-10"):
        checkpoint(tmp_path / name)
    (tmp_path / "merged-sma-9-10" / "pmerge.json").write_text("{}")
    (tmp_path / "latest").symlink_to("ckpt_100")
    checkpoint(tmp_path / "ckpt_200", "model.ckpt")
    checkpoint(tmp_path / "final")
    skipped: list[str] = []
    assert found_in(tmp_path, skipped=skipped) == ["ckpt_9", "ckpt_10", "ckpt_100"]
    assert [line.split(" is left out: ")[1].split(";")[0] for line in skipped] == [
        "a link to ckpt_100",
        "a result of pmerge",
        "its name has no step",
        "it holds no weights that pmerge reads",
    ]
    assert found_in(tmp_path / "merged-sma-9-10", tmp_path / "latest") == ["merged-sma-9-10", "latest"]
    assert read_candidate(tmp_path / "latest").step == 100
    with pytest.raises(UsageError, match="named twice"):
        discover([tmp_path / "latest", tmp_path])


def test_a_run_with_a_final_model_is_a_run_only_when_alone(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out")
    checkpoint(out / "checkpoint-500")
    assert found_in(out) == ["out"]
    checkpoint(out / "checkpoint-1000")
    assert found_in(out) == ["checkpoint-500", "checkpoint-1000"]
    assert found_in(out, checkpoint(tmp_path / "out2")) == ["out", "out2"]


def test_folders_and_files_inside_a_checkpoint_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("adapter", "vision"):
        checkpoint(tmp_path / "a" / name)
    checkpoint(tmp_path / "a")
    checkpoint(tmp_path / "b", "checkpoint-00001-of-00002.safetensors", "checkpoint-00002-of-00002.safetensors")
    checkpoint(tmp_path / "c", "00001.safetensors", "00002.safetensors")
    checkpoint(tmp_path / "d", "step-1.safetensors", "step-2.safetensors", "model.safetensors.index.json")
    assert [found_in(tmp_path / name) for name in "abcd"] == [["a"], ["b"], ["c"], ["d"]]


def test_files_named_by_step_are_checkpoints(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "files", *(f"model_step_{step}.safetensors" for step in (10, 9)))
    files = [folder / "model_step_9.safetensors", folder / "model_step_10.safetensors"]
    assert discover([folder]) == [str(path) for path in files]
    assert discover([folder, checkpoint(tmp_path / "other")]) == [str(path) for path in (*files, tmp_path / "other")]
    assert [read_candidate(path).step for path in files] == [9, 10]


def test_nothing_found_says_what_is_there_and_what_to_do(tmp_path: Path) -> None:
    checkpoint(tmp_path / "pickles" / "step_1", "model.ckpt")
    checkpoint(tmp_path / "project" / "run" / "step_1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"")
    for name, said in [
        ("pickles", "step_1/model.ckpt"),
        ("project", f"pmerge average {tmp_path / 'project' / 'run'}"),
        ("empty", "an empty folder"),
        ("missing", "no such checkpoint"),
        ("notes.txt", "not a file of weights that pmerge reads"),
        ("ckpt_*", "the shell found nothing"),
        ("model-00001-of-00003.safetensors", f"name its folder:  {tmp_path}"),
        ("nowhere/ckpt_1", f"ls {tmp_path}"),
    ]:
        with pytest.raises(InputError) as refused:
            discover([tmp_path / name])
        assert said in str(refused.value)


def test_trainer_state_outranks_the_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-500")
    assert read_candidate(folder).step == read_candidate(folder / "model.safetensors").step == 500
    state = folder / "trainer_state.json"
    state.write_text('{"global_step": 700, "loss": NaN}')
    assert read_candidate(folder).step == read_candidate(folder / "model.safetensors").step == 700
    assert "step 700 by its trainer_state.json, not 500 as in its name" in str(read_candidate(folder).step_warning)
    state.write_text('{"epoch": 1.0}')
    assert read_candidate(folder).step == 500 and read_candidate(folder).step_warning is None


def test_the_time_of_a_checkpoint_is_that_of_its_newest_weights(tmp_path: Path) -> None:
    names = {
        "a": ["model.safetensors"],
        "b": ["x-1.safetensors", "x-2.safetensors"],
        "c": ["tp_0/x.safetensors", "tp_1/x.safetensors"],
    }
    for number, (name, files) in enumerate(names.items()):
        for file in files:
            checkpoint((tmp_path / name / file).parent, Path(file).name)
            os.utime(tmp_path / name / file, (1_700_000_000 + number, 1_700_000_000 + number))
        if len(files) > 1:
            os.utime(tmp_path / name / files[0], (1, 1))
    (tmp_path / "a" / "eval_results.json").write_text("{}")  # the folder of the oldest is the newest
    found, *_ = find_candidates([tmp_path / name for name in "cba"], Selection(order="mtime"))
    assert [candidate.path for candidate in order_candidates(found, "mtime", True)] == [str(tmp_path / name) for name in "abc"]
    assert [candidate.mtime_ns // 10**9 - 1_700_000_000 for candidate in found] == [2, 1, 0]
    assert {candidate.mtime_ns for candidate in find_candidates([tmp_path / "a"])[0]} == {0}


def test_the_time_of_pickled_weights_is_that_of_the_newest(tmp_path: Path) -> None:
    files = {
        "a": ["pytorch_model.bin"],
        "b": ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        "c": ["model.safetensors", "pytorch_model.bin"],
    }
    for number, (name, inside) in enumerate(files.items()):
        (tmp_path / name).mkdir()
        for later, file in enumerate([*inside, "optimizer.bin"]):
            (tmp_path / name / file).write_bytes(b"")
            os.utime(tmp_path / name / file, (10 * number + later + 1,) * 2)
    times = [read_candidate(tmp_path / name, with_time=True).mtime_ns // 10**9 for name in "abc"]
    assert times == [1, 12, 21]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "[" * 100_000, "\xff", *(f'{{"global_step": {v}}}' for v in ('"5"', "true", "5.0", "-1", "9" * 400, "9" * 5000))],
    ids=lambda text: text[:22],
)
def test_a_broken_trainer_state_is_named(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path / "checkpoint-500")
    (folder / "trainer_state.json").write_bytes(text.encode("latin-1"))
    found = read_candidate(folder)
    assert found.step == 500 and "trainer_state" in str(found.step_warning)
    nameless = read_candidate(folder.rename(tmp_path / "nameless"))
    assert nameless.step is None
    notes, warnings = check_steps([found, *run(1, 2)], run(1, 2))
    assert "trainer_state" in notes[0] and warnings == []
    notes, warnings = check_steps([found, *run(1, 2)], [found])
    assert notes == [] and "trainer_state" in warnings[0]
    for attempt in (
        lambda: check_steps([nameless], [nameless]),
        lambda: order_candidates([nameless, *run(1)], "step", True),
    ):
        with pytest.raises(InputError, match="trainer_state"):
            attempt()


def test_a_huge_or_odd_trainer_state_is_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-500")
    state = folder / "trainer_state.json"
    os.mkfifo(state)
    assert read_candidate(folder).step == 500
    state.unlink()
    with state.open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than" in str(read_candidate(folder).step_warning)


def test_stage_of_the_folder_above(tmp_path: Path) -> None:
    found = [read_candidate(checkpoint(tmp_path / f"stage{i}" / f"step{i}000")) for i in (1, 2)]
    assert [(c.step, c.stage) for c in found] == [(1000, "stage1"), (2000, "stage2")]


def test_a_run_without_steps_gives_all(tmp_path: Path) -> None:
    for name in ("best", "final"):
        checkpoint(tmp_path / name)
    assert found_in(tmp_path) == ["best", "final"]


def test_before_a_spike_the_advice_is_to_roll_back() -> None:
    advice = [
        note for note in selection.select_checkpoints(run(1, 2, 3, 4), Selection(before=4, last=2), "sma").notes if "spike" in note
    ]
    assert advice == ["to train on after a spike, roll back to ckpt_3 with its optimizer: no merge did better (docs/resume.md)"]
    assert "spike" not in str(selection.select_checkpoints(run(1, 2, 3, 4), Selection(to_step=3), "sma").notes)


def test_an_earlier_result_among_the_inputs_is_an_error_unless_it_is_allowed(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / name) for name in ("step_1", "step_2", "merged-sma-1-2")]
    (paths[2] / "pmerge.json").write_text("{}")
    with pytest.raises(UsageError, match="merged-sma-1-2 is an earlier result of pmerge") as found:
        find_candidates(paths)
    assert f"pmerge average {paths[0]} {paths[1]}" in found.value.hint and "--allow-merged" in found.value.hint
    with pytest.raises(UsageError, match="earlier result"):
        find_candidates([*paths[:2], paths[2] / "model.safetensors"])
    assert len(find_candidates(paths, Selection(allow_merged=True)).candidates) == 3
    assert len(find_candidates(tmp_path, Selection(incomplete="error")).candidates) == 2
