"""The ground that faults are tried on: two small checkpoints, an older result, and what must hold.

The invariant after every fault: the destination is absent or complete (with --overwrite: the old or
the new result), nothing of the inputs has changed, and the same command ends with the bytes of a
run that nothing disturbed, and leaves no staging folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from faults.runs import Ended, FaultRuns

FILESYSTEMS: dict[str, dict[str, int]] = {
    "Linux": {},
    "no renameat2 (NFS, Lustre)": {"renameat2": errno.EINVAL},
    "no folder rename": {"renamedir": errno.EXDEV, "renameat2": errno.EINVAL},
    "no flock": {"flock": errno.ENOTSUP},
    "no fsync of folders or files": {"fsync": errno.EINVAL},
    "no fallocate": {"fallocate": errno.EOPNOTSUPP},
}
COMMAND = ("average", "in", "-o", "out/merged", "--threads", "1", "--quiet")
PMERGE = (sys.executable, "-m", "merge_cli")


class CannotTry(Exception):
    """This machine cannot inject that fault; the text says why."""


@dataclass
class Row:
    """One line of the table: how many points were tried, and what was wrong at which."""

    fault: str
    expected: str
    points: int = 0
    wrong: list[str] = field(default_factory=list)
    seen: str = ""
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return self.points > 0 and not self.wrong


class Ground:
    """A folder with two small checkpoints `in`, an older result `old`, and the answer that a run
    without faults gives.
    """

    def __init__(self, folder: Path, runs: FaultRuns, elements: int = 3000, distributed: bool = False) -> None:
        write = write_distributed if distributed else write_checkpoint
        self.folder = folder
        self.runs = runs
        self.out = folder / "out"
        self.merged = self.out / "merged"
        self.staging = self.out / "merged.pmerge-partial"
        for step in (100, 200, 300):
            write(folder / "in" / f"checkpoint-{step}", step, elements)
        shutil.move(folder / "in" / "checkpoint-300", folder / "newer")
        self.inputs = digests(folder / "in")
        self.must(runs.run((*COMMAND, "--method", "wma"), folder))
        shutil.move(self.merged, folder / "old")
        self.old = digests(folder / "old")
        self.must(runs.run(COMMAND, folder))
        self.expected = digests(self.merged)
        assert self.expected != self.old

    def must(self, ended: Ended) -> None:
        if ended.code:
            raise SystemExit(f"a run without a fault failed:\n{ended.stderr}")

    def reset(self, overwrite: bool = False) -> None:
        """An empty `out`, or one with the old result in it."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if overwrite:
            shutil.copytree(self.folder / "old", self.merged)

    def invariant(self, overwrite: bool = False) -> str:
        """ "" while nothing is lost or half there, else what is wrong."""
        if digests(self.folder / "in") != self.inputs:
            return "the inputs changed"
        found = digests(self.merged)
        if found == self.expected:
            return ""
        if overwrite:
            aside = digests(self.staging / "replaced")
            return "" if self.old in (found, aside) and (found == self.old or not found) else "the old result is lost"
        readable = any(name.endswith((".index.json", ".metadata")) for name in found)
        return "a destination that is not complete" if self.merged.exists() and (readable or not self.staging.exists()) else ""

    def continued(self, refuse: Mapping[str, int], overwrite: bool = False, arguments: Sequence[str] = COMMAND) -> str:
        """Run the same command without the fault: "" if all is well at the end, else what is not."""
        complete = digests(self.merged) == self.expected
        again = self.runs.run((*arguments, *(["--overwrite"] if overwrite else [])), self.folder, refuse=refuse)
        if again.code and not (complete and "exists already" in again.stderr):
            return f"the next run exits {again.code}: {again.stderr.strip()}"
        if digests(self.merged) != self.expected:
            return "the next run gives other bytes"
        if self.staging.exists() and not again.code:
            return f"left behind: {sorted(str(p.relative_to(self.out)) for p in self.staging.rglob('*'))}"
        return ""


def write_checkpoint(folder: Path, step: int, elements: int) -> None:
    """Two shards, an index, a config, a tokenizer and a side file in a sub-folder; neighbors in
    `step` are close.
    """
    (folder / "chat_templates").mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    weight_map: dict[str, str] = {}
    for shard in (1, 2):
        name = f"model-{shard:05d}-of-00002.safetensors"
        tensors = {f"layers.{shard}.{i}": torch.randn(elements, generator=generator).bfloat16() for i in range(3)}
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_templates" / "tool.jinja").write_text("{{ tools }}")


def write_distributed(folder: Path, step: int, elements: int) -> None:
    """A distributed checkpoint as torchtitan saves it, in two files, with training state."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    generator = torch.Generator().manual_seed(step)
    state: dict[str, Any] = {f"layers.{i}.w": torch.randn(elements, generator=generator).bfloat16() for i in range(6)}
    state["optimizer"] = {"state": {"layers.0.w": {"exp_avg": torch.randn(elements, generator=generator)}}}
    state["train_state"] = {"step": torch.tensor(step)}
    with warnings.catch_warnings(action="ignore"):  # that one process is meant, and of torch's own storages
        save(state, storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file; pmerge.json without how the run was started, and when the inputs
    were copied to their place.
    """
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file():
            data = path.read_bytes()
            if path.name == "pmerge.json":
                with suppress(ValueError, KeyError, TypeError):  # a broken one is compared as it is
                    data = _without_times(data)
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def _without_times(data: bytes) -> bytes:
    manifest = {**json.loads(data), "command": "", "sha256": ""}
    for file in (file for entry in manifest["inputs"] for file in entry["files"]):
        file["version"] = ""
    return json.dumps(manifest, sort_keys=True).encode()


def refused_then_continued(row: Row, ended: Ended | subprocess.CompletedProcess[str], text: str, out: Path) -> None:
    """Note whether a run ended with exit code 1, the text in its message, no traceback and no
    destination.
    """
    code = ended.code if isinstance(ended, Ended) else ended.returncode
    row.points += 1
    row.seen = ended.stderr.strip().splitlines()[0] if ended.stderr.strip() else f"exit {code}"
    if code != 1 or text not in ended.stderr or "Traceback" in ended.stderr:
        row.wrong.append(f"exit {code}: {ended.stderr.strip()}")
    if out.exists():
        row.wrong.append(f"{out} exists")


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, as docs/reliability.md shows them."""
    lines = ["| fault | expected | points | survived | lost | seen |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.fault} | {row.expected} | 0 | - | - | not tried here: {row.skipped} |")
        else:
            lost = min(len(row.wrong), row.points)
            lines.append(f"| {row.fault} | {row.expected} | {row.points} | {row.points - lost} | {lost} | {row.seen[:120]} |")
    return "\n".join(lines)
