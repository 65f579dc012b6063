"""Who runs in `scripts/bench`: for each contestant the command that averages checkpoints into a new
folder.

Everyone is a process of its own, so that start-up counts for all. `floor` averages nothing: it
reads every input once and copies one checkpoint, which is the least that any tool has to move, and
makes it durable (in RAM that takes no time), as pmerge does and the peers do not. `parallel_floor`
moves the same and hashes, by as many threads as pmerge uses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

LIB = Path(__file__).resolve().parents[1]
PLACES = str(LIB / "bench" / "places.py")
RANGE_BYTES = 2 << 20  # of a request to a store far away
MERGEKIT = "0.1.5"
TORCH = "2.13.0"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Unavailable(Exception):
    """This contestant cannot run here; the text says why."""


@dataclass(frozen=True)
class Contestant:
    name: str
    what: str
    command: Callable[[list[Path], Path], list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    outputs: int = 1
    threads: int = 0  # that a parallel floor uses, or is compared with
    mean: str = ""  # the folder in the output that holds the mean of all checkpoints, where there are several


def floor(copies: int = 1) -> Contestant:
    each = 'for k in $copies; do mkdir -p "$out/$k" && cp -r --reflink=never "$first/." "$out/$k" || exit 1; done'
    durable = 'find "$out" -type f -exec sync {} +'
    script = f'out=$1 copies=$2 first=$3; shift 3; cat "$@" > /dev/null && {each} && {durable}'

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        files = sorted(str(path) for c in checkpoints for path in c.glob("*.safetensors"))
        folders = "." if copies == 1 else " ".join(map(str, range(copies)))
        return ["sh", "-c", script, "floor", str(out), folders, str(checkpoints[0]), *files]

    return Contestant("floor", f"cat all inputs > /dev/null, cp one checkpoint {copies} x, sync", command, outputs=copies)


def parallel_floor(threads: int, copies: int = 1, name: str = "parallel floor") -> Contestant:
    program = str(LIB / "bench" / "parallel_floor.py")

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        return [sys.executable, program, str(out), str(threads), str(copies), *map(str, checkpoints)]

    what = f"read all inputs, hash and write the output {copies} x, {threads} threads"
    return Contestant(name, what, command, outputs=copies, threads=threads)


SWEEP = ("sma", "wma", "ema:0.1", "ema:0.2", "ema:0.3", "decay:1-sqrt", "decay:cosine", "power:0.2")


def pmerge_sweep(memory: str, device: str, more: list[str], threads: int = 0) -> Contestant:
    """Eight outputs, each of all checkpoints."""
    program = Path(sys.executable).with_name("pmerge")
    options = ["--method", ",".join(SWEEP), "--memory", memory, "--device", device, "--json", "--quiet", *more]

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        return [str(program), "sweep", *map(str, checkpoints), *options, "-o", str(out)]

    return Contestant("pmerge", f"pmerge sweep {' '.join(options)}", command, outputs=len(SWEEP), threads=threads, mean="sma")


def pmerge(
    memory: str, device: str, more: list[str], threads: int = 0, name: str = "pmerge", program: Path | None = None
) -> Contestant:
    """An average by this pmerge, or by the one installed as `program`. It is compared with the
    parallel floor of `threads`.
    """
    program = program or Path(sys.executable).with_name("pmerge")
    options = ["--method", "sma", "--memory", memory, "--device", device, "--json", "--quiet", *more]

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        return [str(program), "average", *map(str, checkpoints), *options, "-o", str(out)]

    if not program.exists():
        raise Unavailable(f"{program} is not installed (run scripts/setup)")
    tried = subprocess.run([program, "average", "--help"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise Unavailable(f"`pmerge average --help` fails: {(tried.stderr.strip() or '?').splitlines()[-1]}")
    return Contestant(name, f"{program.name} average {' '.join(options)}", command, threads=threads)


def loop(how: str, what: str) -> Contestant:
    def command(checkpoints: list[Path], out: Path) -> list[str]:
        return [sys.executable, str(LIB / "bench" / "peers.py"), how, str(out), *map(str, checkpoints)]

    return Contestant(how, what, command)


def mergekit(environment: Path, work: Path) -> Contestant:
    """mergekit's `linear`, summing in float32 as the others do; makes its virtual environment if
    missing.
    """
    python, program = environment / "bin" / "python", environment / "bin" / "mergekit-yaml"
    if not program.exists():
        print(f"installing mergekit {MERGEKIT} into {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        (environment / ".gitignore").write_text("*\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, f"mergekit=={MERGEKIT}", f"torch=={TORCH}"], check=False).returncode:
            raise Unavailable(f"mergekit {MERGEKIT} could not be installed into {environment}")

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(c), "parameters": {"weight": 1.0}} for c in checkpoints],
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        path = work / "mergekit.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        return [str(program), str(path), str(out), "--quiet", "--no-copy-tokenizer"]

    return Contestant("mergekit", f"mergekit-yaml {MERGEKIT}, linear, float32 sums", command, OFFLINE)


def dcp(memory: str, more: list[str], threads: int) -> Contestant:
    """pmerge on torch distributed checkpoints of the same tensors, which are made when they are
    asked for.
    """
    like = pmerge(memory, "cpu", more, threads)

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        twins = checkpoints[0].parent.with_name(checkpoints[0].parent.name + "-dcp")
        if not twins.exists():
            subprocess.run([sys.executable, "-W", "ignore", PLACES, "dcp", twins, *checkpoints], check=True)
        return like.command([twins / checkpoint.name for checkpoint in checkpoints], out)

    return replace(like, name="pmerge, DCP", what=f"{like.what}, of distributed checkpoints saved on 8 ranks", command=command)


def far(port: int, work: Path, memory: str, more: list[str], threads: int) -> list[Contestant]:
    """A client that reads the checkpoints by ranges and does nothing with them, and pmerge, both
    from the store at `port`, whose buckets are the folders in `work`.
    """
    like = pmerge(memory, "cpu", ["--threads", str(threads), "--chunk-size", str(RANGE_BYTES), *more], threads, "pmerge, s3://")
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}

    def bare(checkpoints: list[Path], out: Path) -> list[str]:
        files = [str(file.relative_to(work)) for each in checkpoints for file in sorted(each.glob("*.safetensors"))]
        return [sys.executable, PLACES, "read", str(port), str(threads), str(RANGE_BYTES), *files]

    def command(checkpoints: list[Path], out: Path) -> list[str]:
        program, verb, *rest = like.command([], out)
        return [program, verb, *(f"s3://{checkpoint.relative_to(work)}" for checkpoint in checkpoints), *rest]

    what = f"http.client, {threads} ranges of {RANGE_BYTES} bytes at once, nothing done with them"
    return [
        Contestant("bare client", what, bare),
        replace(like, command=command, environment={**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}),
    ]


@contextmanager
def store_far_away(work: Path, delay_s: float, bytes_per_s: int) -> Iterator[int]:
    """A store on loopback that answers after `delay_s`, at most `bytes_per_s` on a connection; its
    port.
    """
    command = [sys.executable, PLACES, "serve", str(work), str(delay_s), str(bytes_per_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.terminate()


PEERS: dict[str, Callable[[Path, Path], Contestant]] = {
    "naive": lambda *_: loop("naive", "load_file whole checkpoints, float32 sums, save_file"),
    "safe_open": lambda *_: loop("safe_open", "safe_open shard by shard, float32 sums, save_file"),
    "mergekit": mergekit,
}
