"""The model card of a pushed result: the method, the checkpoints and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.stores.hub import SCHEME, parse_place
from merge_cli.stores.store import name_of

CARD = "README.md"
_MOST_ROWS = 200


def model_card(manifest: Mapping[str, Any]) -> bytes:
    """A `README.md` by the record of a result. Of paths it has the last names alone, of
    checkpoints on the Hub the whole address.
    """
    inputs = manifest["inputs"]
    parameters = ", ".join(f"{name} {value}" for name, value in manifest["parameters"].items() if name != "weights")
    method = f"`{manifest['method']}`" + (f" with {parameters}" if parameters else "")
    repos = sorted({parse_place(each["path"]).repo for each in inputs if each["path"].startswith(SCHEME)})
    lines = ["---", "tags:", "- merge", "- pmerge"]
    if repos:
        lines += ["base_model:", *(f"- {repo}" for repo in repos), "base_model_relation: merge"]
    lines += [
        "---",
        "",
        "# Averaged checkpoints",
        "",
        f"The weighted average of {len(inputs)} checkpoints of one training run, by the method {method},",
        f"made with pmerge {manifest['pmerge']}. Configuration and tokenizer are those of"
        f" {_cell(_label(manifest['base']))}. `pmerge.json` has the full record, with the sha256 of every file.",
        "",
        "| checkpoint | step | coefficient |",
        "|---|---:|---:|",
    ]
    for each in inputs[:_MOST_ROWS]:
        step = "" if each["step"] is None else each["step"]
        lines.append(f"| {_cell(_label(each['path']))} | {step} | {each['coefficient']:.6g} |")
    if len(inputs) > _MOST_ROWS:
        lines.append(f"| and {len(inputs) - _MOST_ROWS} more | | |")
    return ("\n".join(lines) + "\n").encode()


def _label(path: str) -> str:
    return path if path.startswith(SCHEME) else name_of(path)


def _cell(text: str) -> str:
    """A name as code in a table: names come from others, and may hold any character."""
    return f"`{''.join(each if each.isprintable() and each not in '`|' else '?' for each in text)}`"
