"""Small helpers over files: nothing hangs, nothing is passed over where that matters."""

import errno
import os
from pathlib import Path

import pytest

from merge_cli.system.files import files_in, sha256_of


def test_a_pipe_has_no_sha256_and_hangs_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert sha256_of(tmp_path / "pipe") == sha256_of(tmp_path / "nothing") == sha256_of(tmp_path) == ""


def test_a_folder_that_cannot_be_read_raises_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("")
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("deep"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert [*files_in(tmp_path)] == [*files_in(tmp_path / "gone", strict=True)] == []
    with pytest.raises(OSError, match="Input/output"):
        list(files_in(tmp_path, strict=True))
