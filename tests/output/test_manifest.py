"""The files beside the weights: written last, after every header was read back."""

import os
from pathlib import Path

import pytest
import torch
from builders import training_run, write_run

from merge_cli import average
from merge_cli.errors import OutputError
from merge_cli.output import manifest
from merge_cli.output.records import FileRecord
from merge_cli.system.held import HeldFolder


def test_a_header_that_cannot_be_read_back_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lost bytes: size and time of the shard are those of its record."""
    run = write_run(tmp_path / "run", training_run({"w": torch.arange(300.0)}, 2))
    write = manifest.write_side_files

    def lose(base: object, staging: HeldFolder, *rest: object) -> dict[str, FileRecord]:
        (shard,) = staging.path.rglob("*.safetensors")
        before = shard.stat()
        with shard.open("r+b") as file:
            file.seek(8)
            file.write(bytes(8))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        return write(base, staging, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(manifest, "write_side_files", lose)
    with pytest.raises(OutputError, match="cannot read back what was written"):
        average(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
