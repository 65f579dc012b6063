"""Carry out attacks by name, count what broke, and print one paragraph for each."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from faults.attacks import (
    environment,
    headers,
    inputs,
    limits,
    links,
    names,
    odd_files,
    power,
    removed,
    resealed,
    shared,
    strangers,
)
from faults.attacks.world import Attack, World
from faults.ground import CannotTry
from faults.runs import FaultRuns

ATTACKS: tuple[Attack, ...] = (
    links.ATTACK,
    removed.ATTACK,
    *strangers.ATTACKS,
    shared.ATTACK,
    resealed.ATTACK,
    *odd_files.ATTACKS,
    limits.ATTACK,
    headers.ATTACK,
    inputs.ATTACK,
    environment.ATTACK,
    names.ATTACK,
    power.ATTACK,
)
SHOWN = 6


def catalogue() -> str:
    """The attacks, one a line."""
    return "\n".join(f"{attack.name:12} {attack.finding:8} {attack.promise}" for attack in ATTACKS)


def known() -> set[str]:
    return {attack.name for attack in ATTACKS}


def carry_out(wanted: Sequence[str], *, thorough: bool, show_all: bool = False) -> bool:
    """Carry out these attacks, or with "all" every one; whether all promises held."""
    chosen = [attack for attack in ATTACKS if attack.name in wanted or "all" in wanted]
    results = [attempt(attack, thorough, show_all) for attack in chosen]
    return all(results)


def attempt(attack: Attack, thorough: bool, show_all: bool) -> bool:
    began, outcomes, broken = time.monotonic(), Counter[bool](), []
    print(f"{attack.finding} {attack.name}: {attack.promise}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pmerge-attack-") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        world = World(Path(folder) / "world", stack.enter_context(FaultRuns()), stack, thorough=thorough)
        try:
            for what, wrong in attack.tries(world):
                outcomes[not wrong] += 1
                broken += [(what, wrong)] if wrong else []
                if show_all:
                    print(f"      {'BROKEN' if wrong else 'held':8}{what}{': ' + wrong if wrong else ''}", flush=True)
        except CannotTry as reason:
            print(f"      not tried here: {reason}")
    if not show_all:
        for what, wrong in broken[:SHOWN]:
            print(f"      BROKEN  {what}: {wrong}")
        if len(broken) > SHOWN:
            print(f"      and {len(broken) - SHOWN} more; --verbose shows all")
    held = not broken
    counts = f"{sum(outcomes.values())} tries, {outcomes[True]} held, {outcomes[False]} broken"
    print(f"{'PASS' if held else 'FAIL'}  {attack.name} ({attack.finding}): {counts}, {time.monotonic() - began:.0f} s", flush=True)
    return held
