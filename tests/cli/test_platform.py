"""Elsewhere than on Linux pmerge ends with one error, before it imports or calls anything that only
Linux has.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

import pytest

LINUX_ONLY = ("fcntl", "pwd", "resource")


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_another_platform_is_one_error(platform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "argv", ["pmerge", "average", "run"])
    for name in [name for name in sys.modules if name.split(".")[0] == "merge_cli"]:
        monkeypatch.delitem(sys.modules, name)
    for name in LINUX_ONLY:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(os, "pipe2")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("merge_cli", run_name="__main__")
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 2
    assert f"error: pmerge needs Linux, and this is {platform}\nhint: " in shown.err
