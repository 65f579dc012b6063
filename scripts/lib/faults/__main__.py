"""Break `pmerge average` on purpose, in every way that this machine can, and report what survived.

    scripts/faults               every fault, a table at the end; exit code 1 if anything was lost
    scripts/faults --quick       every third point of the sweeps
    scripts/faults --only kill   the faults whose name contains "kill"
    scripts/faults --soak 100    besides, a hundred rounds of kill -9 at random moments
    scripts/faults --attack all  the attacks of a hostile neighbor or file; --list has their names
    scripts/faults --fuzz 60     every parser, with changed bytes
    scripts/faults --mutants     promises broken in a copy of the sources: does the named test notice?

The invariant after every fault: the destination is absent or complete (with --overwrite: the old or
the new result), nothing of the inputs has changed, and the same command ends with the bytes of a
run that nothing disturbed, and leaves no staging folder.

Mounting needs root; a fault that this machine cannot inject is listed with the reason, never as
survived.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from faults import circumstances, mutants, ranks, storage, sweeps
from faults.attacks import carry_out as attacks
from faults.fuzz import carry_out as fuzz
from faults.ground import CannotTry, Ground, Row, table
from faults.runs import FaultRuns

SINGLE: tuple[Callable[[Ground], Row], ...] = (
    storage.space,
    storage.inodes,
    storage.fsync_fails,
    storage.read_only,
    storage.no_permission,
    circumstances.file_size_limit,
    circumstances.few_descriptors,
    storage.slow_storage,
    circumstances.changed_inputs,
    circumstances.locks,
    circumstances.another_request,
    circumstances.damaged_finished_file,
)


def tries(ground: Ground, every: int, soak_rounds: int) -> list[tuple[str, Callable[[], Row]]]:
    """Every fault by name. Sweeps take every `every`-th point."""
    found = [*sweeps.sweeps(ground, every)]
    found += [(attempt.__name__, lambda attempt=attempt: attempt(ground)) for attempt in SINGLE]  # type: ignore[misc]
    found += ranks.tries(ground, every)
    found.append(("power_loss", lambda: storage.power_loss(ground, 3 * every)))
    found.append(("strace", lambda: sweeps.strace_sweep(ground, 4 * every)))
    if soak_rounds:
        found.append(("soak", lambda: sweeps.soak(ground, soak_rounds)))
    return found


def attempted(name: str, attempt: Callable[[], Row]) -> Row:
    """The row of one fault, which is reported on stderr as soon as it is known."""
    try:
        row = attempt()
    except CannotTry as reason:
        row = Row(name, "", skipped=str(reason))
    state = "--" if row.skipped else "ok" if row.ok else "BAD"
    print(f"{state:4}{row.fault}: {row.points} points", file=sys.stderr, flush=True)
    for line in row.wrong[:5]:
        print(f"      {line}", file=sys.stderr)
    return row


def main() -> int:
    parser = argparse.ArgumentParser("scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every third point of the sweeps")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="rounds of random kills")
    parser.add_argument("--attack", nargs="+", default=[], metavar="NAME", help="carry out attacks, or all, instead of faults")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="feed changed bytes to every parser for so long, instead")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="of the first case of --fuzz")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the bytes there that broke a promise (--fuzz)")
    parser.add_argument("--mutants", action="store_true", help="break promises in the sources, instead; --only takes some")
    parser.add_argument("--list", action="store_true", help="list the attacks")
    parser.add_argument("--verbose", action="store_true", help="show every try of an attack")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.list:
        print(attacks.catalogue())
        return 0
    if options.attack:
        if unknown := set(options.attack) - attacks.known() - {"all"}:
            parser.error(f"no attack is called {', '.join(sorted(unknown))}; there are:\n{attacks.catalogue()}")
        return 0 if attacks.carry_out(options.attack, thorough=not options.quick, show_all=options.verbose) else 1
    if options.mutants:
        return 0 if mutants.carry_out(options.only) else 1
    if options.fuzz is not None:
        return 0 if fuzz.carry_out(options.fuzz, options.first, options.keep) else 1
    with tempfile.TemporaryDirectory(prefix="pmerge-faults-") as folder, FaultRuns() as runs:
        Path(folder).chmod(0o755)
        ground = Ground(Path(folder) / "ground", runs)
        wanted = tries(ground, 3 if options.quick else 1, options.soak)
        rows = [attempted(name, attempt) for name, attempt in wanted if options.only in name]
    print(table(rows))
    return 0 if rows and all(row.ok or row.skipped for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
