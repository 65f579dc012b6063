"""F3: a result is changed and `pmerge.json` sealed anew: its sha256 is a checksum, so anybody can.

`verify --against-inputs --sample all` makes the plan again from the inputs, so it must notice
whatever is not what that plan would publish: headers, the set of files, index, side files, record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.attacks.world import Attack, Try, World, misbehavior, sealed
from faults.ground import COMMAND
from faults.runs import Ended

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
VERIFY = ("verify", "changed", "--against-inputs", "--sample", "all", "--quiet")
Manifest = dict[str, Any]
PLANTED = ("evil.py", "model.pkl", "MODEL.SAFETENSORS", "pytorch_model.bin.index.json", "adapter_config.json", "template.jinja")


def rewrite_header(change: Callable[[Manifest], Manifest]) -> Callable[[Path], None]:
    """A change of a shard's header that keeps its length."""

    def rewrite(folder: Path) -> None:
        path = folder / SHARD
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(change(json.loads(content[8 : 8 + length])), separators=(",", ":")).encode().ljust(length)
        assert len(header) == length
        path.write_bytes(content[:8] + header + content[8 + length :])

    return rewrite


def exchange_names(header: Manifest) -> Manifest:
    return {{"layers.2.0": "layers.2.1", "layers.2.1": "layers.2.0"}.get(name, name): entry for name, entry in header.items()}


def rename_dtype(header: Manifest) -> Manifest:
    return {name: {**entry, "dtype": "F16"} if "dtype" in entry else entry for name, entry in header.items()}


def reshape(header: Manifest) -> Manifest:
    return {**header, "layers.2.0": {**header["layers.2.0"], "shape": [60, 50]}}


def rename_metadata(header: Manifest) -> Manifest:
    return {**header, "__metadata__": {"format": "tf"}}


def exchange_places(header: Manifest) -> Manifest:
    one, other = header["layers.2.0"]["data_offsets"], header["layers.2.1"]["data_offsets"]
    moved = {"layers.2.0": other, "layers.2.1": one}
    return {name: {**entry, "data_offsets": moved[name]} if name in moved else entry for name, entry in header.items()}


def remove_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    index = json.loads((folder / INDEX).read_bytes())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    index["metadata"]["total_size"] //= 2
    (folder / INDEX).write_text(json.dumps(index))


def change_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    (folder / INDEX).write_text(json.dumps({**index, "metadata": {**index["metadata"], "total_size": 1}}))


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[-3] ^= 1
    (folder / SHARD).write_bytes(content)


def link_shard(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / SHARD).rename(folder / "elsewhere" / SHARD)
    (folder / SHARD).symlink_to(f"elsewhere/{SHARD}")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return put


OF_FILES: dict[str, Callable[[Path], None]] = {
    "names of two tensors exchanged in a header": rewrite_header(exchange_names),
    "places of two tensors exchanged in a header": rewrite_header(exchange_places),
    "BF16 -> F16 in a header": rewrite_header(rename_dtype),
    "shape [3000] -> [60, 50] in a header": rewrite_header(reshape),
    "metadata of a header": rewrite_header(rename_metadata),
    "a shard removed, from the index too": remove_shard,
    "a shard removed, the index left": remove(SHARD),
    "the index removed": remove(INDEX),
    "total_size of the index": change_index,
    "config.json replaced": write("config.json", '{"model_type": "evil", "auto_map": {"AutoModel": "evil.M"}}'),
    "a side file in a folder replaced": write("chat_templates/tool.jinja", "{{ evil }}"),
    "tokenizer.json removed": remove("tokenizer.json"),
    "evil.py added and listed": write("evil.py", "import os"),
    "a second index added and listed": write("pytorch_model.bin.index.json", "{}"),
    "one bit of a tensor": flip_bit,
    "a shard is a link": link_shard,
}


def changed(**values: object) -> Callable[[Manifest], Manifest]:
    return lambda manifest: {**manifest, **values}


def other_coefficients(manifest: Manifest) -> Manifest:
    inputs = [{**entry, "coefficient": coefficient} for entry, coefficient in zip(manifest["inputs"], (0.9, 0.1), strict=True)]
    return {**manifest, "inputs": inputs}


def other_steps(manifest: Manifest) -> Manifest:
    return {**manifest, "inputs": [{**entry, "step": entry["step"] + 99_000} for entry in manifest["inputs"]]}


OF_THE_RECORD: dict[str, Callable[[Manifest], Manifest]] = {
    "method sma -> wma": changed(method="wma"),
    "method sma -> ema with alpha": changed(method="ema", parameters={"alpha": 0.5}),
    "coefficients, numerators left": other_coefficients,
    "numerators scaled": changed(numerators=[2, 2]),
    "denominator": changed(denominator=3),
    "steps": other_steps,
    "an input less": lambda manifest: {**manifest, "inputs": manifest["inputs"][1:]},
    "inputs in another order": lambda manifest: {**manifest, "inputs": manifest["inputs"][::-1]},
    "base": lambda manifest: {**manifest, "base": manifest["inputs"][0]["path"]},
    "dtype": changed(dtype="fp16"),
    "exclude": changed(exclude=["layers.2.*"]),
    "counts of NaN": changed(nonfinite={"layers.2.0": 7}),
    "fingerprint of the plan": changed(plan="0" * 64),
}


def tries(world: World) -> Iterator[Try]:
    """The inputs have trainer states for as long as this takes: a step in a name proves nothing."""
    world.reset()
    states = [folder / "trainer_state.json" for folder in (world.folder / "in").iterdir()]
    for path in states:
        path.write_text(json.dumps({"global_step": int(path.parent.name.rpartition("-")[2])}))
    world.must(world.runs.run(COMMAND, world.folder))
    yield from tries_of(world)
    for path in states:
        path.unlink()


def tries_of(world: World) -> Iterator[Try]:
    yield Try("nothing changed", "" if verified(world, lambda _: None).code == 0 else "refused, though nothing was changed")
    for what, of_files in OF_FILES.items():
        yield Try(what, passes(world, of_files))
    for what, of_record in OF_THE_RECORD.items():
        yield Try(f"record: {what}", passes(world, lambda _: None, of_record))
    for name in PLANTED:
        yield Try(f"{name} planted, not listed", passes(world, write(name, "x"), seal=False))
    yield Try("record: `files` twice, the second empty, and a shard broken", passes(world, repeated_key, seal=False))


def passes(
    world: World, change: Callable[[Path], object], of_record: Callable[[Manifest], Manifest] | None = None, *, seal: bool = True
) -> str:
    ended = verified(world, change, of_record, seal)
    return misbehavior(ended) or ("verify says that all is well" if ended.code == 0 else "")


def verified(
    world: World, change: Callable[[Path], object], of_record: Callable[[Manifest], Manifest] | None = None, seal: bool = True
) -> Ended:
    """`verify` of the result after a change of its files and of its record, which is then sealed
    anew.
    """
    folder = world.folder / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.merged, folder)
    change(folder)
    if seal:
        manifest = listed(folder)
        (folder / "pmerge.json").write_bytes(sealed(of_record(manifest) if of_record else manifest))
    return world.runs.run(VERIFY, world.folder)


def listed(folder: Path) -> Manifest:
    """The manifest with the files that are there now, and their sizes and sha256."""
    manifest: Manifest = json.loads((folder / "pmerge.json").read_bytes())
    there = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found: dict[str, Manifest] = {"files": {}, "side_files": {}}
    for name, path in there.items():
        if name != "pmerge.json" and "elsewhere" not in name:
            content = path.read_bytes()
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            found["files" if name.endswith(".safetensors") else "side_files"][name] = entry
    return {**manifest, **found}


def repeated_key(folder: Path) -> None:
    """JSON with a key twice: one reader takes the first, another the last."""
    manifest = listed(folder)
    manifest.pop("sha256")
    text = json.dumps(manifest, indent=2).removesuffix("\n}") + ',\n  "files": {}'
    seal = hashlib.sha256(text.encode()).hexdigest()
    (folder / "pmerge.json").write_text(f'{text},\n  "sha256": "{seal}"\n}}\n')
    (folder / SHARD).write_bytes(b"broken")


ATTACK = Attack("resealed", "F3", "verify --against-inputs --sample all finds what is not what the plan would publish.", tries)
