"""Measure pmerge beside two floors and its peers, on checkpoints made for the purpose.

    scripts/bench                                              4 x 1.7 GB, two hand-written loops as peers
    scripts/bench --peers naive,safe_open,mergekit             mergekit too, in an environment of its own
    scripts/bench --shape moe --tensors 20000                  many small tensors
    scripts/bench --size 1.3GB --largest-tensor 1GB            one tensor larger than --memory
    scripts/bench --grow n --plot memory.svg                   a series; also size, largest, tensors, memory
    scripts/bench --inputs run/ckpt_*                          checkpoints that are there already
    scripts/bench --sweep --count 10 --size 200MB              eight averages by `pmerge sweep`, against one read and eight copies
    scripts/bench --beside ../before/.venv/bin/pmerge          another installed pmerge, round by round
    scripts/bench --threads-series 1,2,4,8                     pmerge and the parallel floor with so many threads
    scripts/bench --dcp --peers none                           torch distributed checkpoints of the same tensors too
    scripts/bench --far 30ms,16MB --peers none                 from a store that answers after 30 ms, 16 MB/s a connection
    scripts/bench -- --workers 2                               what follows -- goes to `pmerge average`

Prints the machine, the versions and a table; `--json` prints everything that was measured. Measure
on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench import report
from bench.contestants import (
    LIB,
    PEERS,
    Contestant,
    Unavailable,
    dcp,
    far,
    floor,
    parallel_floor,
    pmerge,
    pmerge_sweep,
    store_far_away,
)
from bench.grow import VALUES, grow
from bench.rounds import Inputs, contest, describe, free_bytes, make_inputs
from checkpoints.shapes import PUBLISHED, SHAPES
from units import format_size, parse_size

FAR = re.compile(r"(\d+)ms,(\d+[MG]B)")
REQUESTS = 16  # at once, to a store far away

Rows = list[tuple[str, dict[str, str]]]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shm = Path("/dev/shm")
    parser.add_argument("--folder", type=Path, default=shm if shm.is_dir() else Path(tempfile.gettempdir()))
    parser.add_argument("--shape", choices=[name for name in SHAPES if name not in PUBLISHED], default="dense")
    parser.add_argument("--size", default="1.7GB")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--tensors", type=int, default=0)
    parser.add_argument("--largest-tensor", default="")
    parser.add_argument("--inputs", type=Path, nargs="+", help="average these instead of making some")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", help=f"of {','.join(PEERS)}, or none; default naive,safe_open, none in series")
    parser.add_argument("--mergekit-env", type=Path, default=LIB.parents[1] / ".venv-mergekit", metavar="FOLDER")
    parser.add_argument("--beside", type=Path, metavar="PMERGE", help="the program of another pmerge: a contestant too")
    parser.add_argument("--threads-series", metavar="LIST", help="pmerge with each of these numbers of threads, as 1,2,4,8")
    parser.add_argument("--dcp", action="store_true", help="distributed checkpoints of the same tensors are a contestant too")
    parser.add_argument("--far", metavar="DELAY,RATE", help="a bare client and pmerge read from an object store on loopback")
    parser.add_argument("--sweep", action="store_true", help="eight outputs by `pmerge sweep`; no peers")
    parser.add_argument("--grow", choices=VALUES)
    parser.add_argument("--sparse", action="store_true", help="inputs of a series are holes, read as zeros: for measuring memory")
    parser.add_argument("--values", help="of the series, with commas between them")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw pmerge's peak memory along the series")
    parser.add_argument("--no-tiny", action="store_true", help="leave out the fixed cost: a merge of two checkpoints of 1 MB")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("pmerge_options", nargs="*", metavar="-- PMERGE OPTIONS")
    options = parser.parse_args(argv)
    default_peers = "none" if options.grow or options.sweep else "naive,safe_open"
    names = (options.peers or default_peers).split(",")
    options.peers = [name for name in names if name != "none"]
    if unknown := set(options.peers) - PEERS.keys():
        parser.error(f"no peer is called {', '.join(sorted(unknown))}: there are {', '.join(PEERS)}")
    if options.plot and not options.grow:
        parser.error("--plot draws a series: it needs --grow")
    if options.threads_series and (options.grow or options.sweep):
        parser.error("--threads-series is a series of averages: leave --grow and --sweep out")
    if (options.dcp or options.far) and (options.inputs or options.grow or options.sweep):
        parser.error("--dcp and --far make their inputs, and average them once")
    if options.far and not FAR.fullmatch(options.far):
        parser.error("--far is a time and a rate, as 30ms,16MB; 0ms,0MB are none")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def line_up(options: argparse.Namespace, work: Path, memory: str, quantized: bool = False, port: int = 0) -> list[Contestant]:
    """The floor, pmerge and the peers that can run; a line to stderr for each that cannot. `port`
    is that of the store far away.
    """
    more = options.pmerge_options
    threads = threads_of(more)
    if options.sweep:
        sweep = pmerge_sweep(memory, options.device, more, threads)
        return [floor(sweep.outputs), parallel_floor(threads, sweep.outputs), sweep]
    if options.threads_series:
        series = [int(number) for number in options.threads_series.split(",")]
        found = [floor()]
        for number in series:
            found.append(parallel_floor(number, name=f"parallel floor, {number} threads"))
            found.append(pmerge(memory, options.device, [*more, "--threads", str(number)], number, f"pmerge, {number} threads"))
        return found
    found = [floor(), parallel_floor(threads)]
    for name, program in (("pmerge", None), *([("beside", options.beside)] if options.beside else [])):
        try:
            found.append(pmerge(memory, options.device, more, threads, name, program))
        except Unavailable as reason:
            print(f"{name}: skipped: {reason}", file=sys.stderr)
    found += [dcp(memory, more, threads)] if options.dcp else []
    found += far(port, work, memory, more, REQUESTS) if port else []
    for name in options.peers:
        if quantized:
            print(f"{name}: skipped: it would average the codes of quantized weights", file=sys.stderr)
            continue
        try:
            found.append(PEERS[name](options.mergekit_env, work))
        except Unavailable as reason:
            print(f"{name}: skipped: {reason}", file=sys.stderr)
    return found


def threads_of(pmerge_options: list[str]) -> int:
    """The threads that pmerge uses with these options: those of --threads, or one a core."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads: int = parser.parse_known_args(pmerge_options)[0].threads
    return threads


def prepare(options: argparse.Namespace, work: Path) -> Inputs:
    if options.inputs:
        return describe(options.inputs)
    need, free = (options.count + (8 if options.sweep else 1)) * parse_size(options.size), free_bytes(work)
    if need > free:
        sys.exit(f"error: {options.folder} has room for {format_size(free)}, this needs {format_size(need)}")
    return make_inputs(
        work / "inputs",
        shape=options.shape,
        size=options.size,
        shards=options.shards,
        count=options.count,
        tensors=options.tensors,
        largest_tensor=options.largest_tensor,
    )


def series(options: argparse.Namespace, work: Path) -> tuple[Rows, report.Facts]:
    """`--grow`: the rows of its table, and what goes into the JSON."""

    def contestants(value: str) -> list[Contestant]:
        return line_up(options, work, value if options.grow == "memory" else options.memory)

    values = options.values.split(",") if options.values else VALUES[options.grow]
    rows, points = [], []
    for value, results in grow(options.grow, values, contestants, work, options.rounds, options.sparse):
        facts = [report.as_json(result) for result in results]
        floor_s = report.floor_seconds(facts)
        parallel_s = report.parallel_seconds(facts)
        rows += [(f"{value} {f['name']}", report.figures(f, floor_s, parallel_s)) for f in facts]
        inputs = results[0].inputs
        moved, tensors = inputs.moved_bytes(1), inputs.num_tensors
        points.append({"value": value, "inputs": str(inputs), "moved_bytes": moved, "tensors": tensors, "results": facts})
    if options.plot and points:
        options.plot.write_text(report.memory_plot(options.grow, options.memory, points))
    return rows, {"grow": options.grow, "points": points}


def compare(options: argparse.Namespace, work: Path) -> tuple[Rows, report.Facts]:
    """One table for the inputs asked for, with the fixed cost: the same for 2 checkpoints of 1 MB."""
    inputs = prepare(options, work)
    with ExitStack() as stack:
        port = 0
        if options.far and (asked := FAR.fullmatch(options.far)):
            rate = parse_size(asked[2]) if int(asked[2][:-2]) else 0
            port = stack.enter_context(store_far_away(work, int(asked[1]) / 1000, rate))
        contestants = line_up(options, work, options.memory, inputs.quantized, port)
        results = contest(contestants, inputs, work, options.rounds)
        facts = [report.as_json(result) for result in results]
        if not options.no_tiny:
            tiny = contest(contestants, make_inputs(work / "tiny", size="1MB", count=2), work, rounds=3)
            facts = [report.as_json(r, t) for r, t in zip(results, tiny, strict=True)]
    floor_s = report.floor_seconds(facts)
    parallel_s = report.parallel_seconds(facts)
    rows = [(f["name"], report.figures(f, floor_s, parallel_s)) for f in facts]
    return rows, {"inputs": str(inputs), "results": facts}


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # leaves no gigabytes behind
    command = shlex.join(["scripts/bench", *(sys.argv[1:] if argv is None else argv)])
    facts, versions = (
        report.machine(options.folder, options.device),
        report.versions(options.peers),
    )
    load_before = os.getloadavg()[0]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # not between making the folder and knowing of it
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pmerge-bench-") as work:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        rows, measured = (series if options.grow else compare)(options, Path(work))
    if options.json:
        about = {"command": command, "machine": facts, "versions": versions, "load_before": load_before}
        print(json.dumps(about | {"rounds": options.rounds} | measured, indent=2))
        return
    print(f"    {command}\n")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(", ".join(f"{key} {value}" for key, value in versions.items()))
    print(f"load before: {load_before:.2f}; {options.rounds} rounds after one of warm-up\n")
    print(f"{measured.get('inputs') or 'time and memory against ' + options.grow}\n")
    report.table(options.grow or "", rows)
    if options.grow:
        report.straightness(options.grow, measured["points"])
    print(f"\n{report.NOTES}")


if __name__ == "__main__":
    main()
