"""Strangers on shared scratch: links and files that they put where pmerge works are refused, and
nothing behind them changes.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run
from typer.testing import CliRunner

from merge_cli import Rank, average, finalize, plan_average, run_average
from merge_cli.cli.app import make_app
from merge_cli.errors import OutputError, UsageError
from merge_cli.output.joint import JointDestination

NAMES = (
    "",
    "lock",
    "checkpoint",
    "done",
    "claims",
    "state.json",
    "state.json.partial",
    "publish.json",
    "checkpoint/model.safetensors.partial",
    "checkpoint/config.json",
    "done/model.safetensors.json",
)


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    return write_run(tmp_path / "run", training_run({"w": torch.ones(8)}, 2))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user, with a file."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


def plant(tmp_path: Path, name: str, victim: Path, kind: str) -> None:
    staging = tmp_path / "out.pmerge-partial"
    path = staging / name if name else staging
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(victim if name in ("", "checkpoint", "done", "claims") else victim / "file")
    elif kind == "second name":
        path.hardlink_to(victim / "file")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
@pytest.mark.parametrize("name", NAMES)
def test_planted_names_are_refused_and_nothing_behind_them_changes(
    name: str, kind: str, restart: bool, run: list[Path], victim: Path, tmp_path: Path
) -> None:
    plant(tmp_path, name, victim, kind)
    with pytest.raises(OutputError):
        average(run, tmp_path / "out", restart=restart)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"file": "precious"}
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")
@pytest.mark.parametrize("name", ["", "checkpoint", "done"])
def test_a_staging_folder_of_another_user_is_refused(name: str, run: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "out.pmerge-partial" / name
    path.mkdir(parents=True)
    os.chown(path, 65534, 65534)
    with pytest.raises(OutputError, match="belongs to another user"):
        average(run, tmp_path / "out")


def test_a_link_above_the_destination_is_followed(run: list[Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "disk")
    assert (average(run, tmp_path / "scratch" / "out").output / "pmerge.json").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")
@pytest.mark.parametrize("trusted", ["65534", "nobody"])
def test_an_owner_that_is_trusted_is_as_good_as_oneself(trusted: str, run: list[Path], tmp_path: Path) -> None:
    staging = tmp_path / "out.pmerge-partial"
    (staging / "checkpoint").mkdir(parents=True)
    for path in (staging, staging / "checkpoint"):
        os.chown(path, 65534, 65534)
    with pytest.raises(OutputError, match="belongs to another user") as refused:
        average(run, tmp_path / "out")
    assert "--trust-owner 65534" in refused.value.hint
    with pytest.raises(OutputError, match="belongs to another user"):
        average(run, tmp_path / "out", trust_owner="1234")
    assert average(run, tmp_path / "out", trust_owner=trusted).has_published


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")
def test_finalize_trusts_an_owner_too(run: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(JointDestination, "begin_to_publish", lambda self: {})
        run_average(plan_average(run, tmp_path / "out", rank=Rank(0, 2, source="--rank")))
    for path in (staging := tmp_path / "out.pmerge-partial", *staging.rglob("*")):
        os.chown(path, 65534, 65534)
    with pytest.raises(OutputError, match="belongs to another user") as refused:
        finalize(tmp_path / "out")
    assert "--trust-owner 65534" in refused.value.hint
    with pytest.raises(UsageError, match="no user nobody-of-this-name"):
        finalize(tmp_path / "out", trust_owner="nobody-of-this-name")
    ended = CliRunner().invoke(make_app(), ["finalize", str(tmp_path / "out"), "--trust-owner", "nobody"])
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "out" / "pmerge.json").is_file() and not staging.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("kind", ["another filesystem", "the same one, mounted twice"])
def test_a_staging_folder_on_another_mount_is_refused_before_anything_is_written(
    kind: str, run: list[Path], tmp_path: Path
) -> None:
    staging, elsewhere = tmp_path / "out.pmerge-partial", tmp_path / "elsewhere"
    staging.mkdir()
    elsewhere.mkdir()
    command = ["mount", "-t", "tmpfs", "none"] if kind == "another filesystem" else ["mount", "--bind", elsewhere]
    if subprocess.run([*command, staging], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match="another filesystem") as refused:
            average(run, tmp_path / "out")
        assert "umount" in refused.value.hint
        assert {path.name for path in staging.iterdir()} <= {"lock"}
    finally:
        subprocess.run(["umount", staging], check=True)
    (staging / "lock").unlink(missing_ok=True)
    assert average(run, tmp_path / "out").has_published
