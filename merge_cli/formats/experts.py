"""Two dialects of the same experts: one matrix per expert and projection, or all experts of a layer
in one 3-D tensor.

    per expert   P.experts.{e}.gate_proj.weight [I, H], .up_proj.weight [I, H], .down_proj.weight [H, I]   (Mixtral: w1, w3, w2)
    fused        P.experts.gate_up_proj [E, 2I, H] (gate above up), P.experts.down_proj [E, H, I]

transformers 5 holds the second in memory and writes either. The rows of both are the same bytes in
the same order, so a checkpoint in one dialect is read as the other by slicing alone. Fused tensors
that are transposed ([E, H, 2I]: Llama-4, gpt-oss) are another matter: their rows are no rows of the
experts, and such a mix is refused.

Nemotron-H has no gate (`up_proj` [E, I, H] alone) and Granite fuses in both dialects, under other
names; routers and their biases are renamed along.

Source: transformers `conversion_mapping.py`, "mixtral", "qwen2_moe" (MergeModulelist(dim=0),
Concatenate(dim=1)), "ernie4_5_moe", "exaone_moe", "granitemoe" and "nemotron_h".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from merge_cli.errors import UnsupportedError
from merge_cli.formats.alike import original_of
from merge_cli.formats.checkpoint import Stored
from merge_cli.formats.logical import Coded, Logical, Stacked, dtype_of, shape_of
from merge_cli.formats.safetensors import DTYPES, TensorInfo

_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_FUSED = re.compile(r"^(?P<experts>.+\.experts)\.(?P<projection>gate_up_proj|up_proj|down_proj)$")
_PROJECTIONS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
_PLACES = (("", ""), (".mlp.", ".block_sparse_moe."), ("model.", "backbone."))  # of fused experts, and of single ones
_FUSED_ALIKE = (
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
)
"""Fused in both dialects, with the same bytes (Granite)."""
_RENAMED = (
    (".block_sparse_moe.gate.", ".mlp.router."),
    (".block_sparse_moe.", ".mlp."),
    (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
    (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
    ("backbone.", "model."),
)


def as_dialect_of(base: Mapping[str, Logical], other: Mapping[str, Logical], where: str) -> tuple[Mapping[str, Logical], str]:
    """`other` under the names of `base`, and a line that says what was mapped ("" where nothing
    needed to be).

    Tensors for which no certain mapping exists stay as they are. Raises UnsupportedError, naming
    the tensor in `where`, for a fused tensor whose rows are not the experts' rows.
    """
    if original_of(base) is original_of(other) or base.keys() == other.keys():
        return other, ""
    missing = base.keys() - other.keys()
    extra = other.keys() - base.keys()
    fused_here = [key for key in other if key in extra and _FUSED.match(key)]
    fused_there = [key for key in base if key in missing and _FUSED.match(key)]
    mapped: dict[str, Logical] = {}
    used: set[str] = set()
    for key in fused_here:
        pieces = _pieces(key, base, missing)
        if pieces:
            mapped.update(_slices(key, other[key], {name: base[name] for name in pieces}, where))
            used.add(key)
    for key in fused_there:
        pieces = _pieces(key, other, extra)
        if pieces:
            mapped[key] = _stack(key, base[key], {name: other[name] for name in pieces}, where)
            used.update(pieces)
    alike = _renames(missing - mapped.keys(), extra - used, _FUSED_ALIKE)
    if not used and not alike:
        return other, ""
    used_renames = _renames(missing - mapped.keys(), extra - used, _FUSED_ALIKE + _RENAMED)
    result: dict[str, Logical] = {key: tensor for key, tensor in other.items() if key not in used and key not in used_renames}
    result.update(mapped)
    result.update({new: other[old] for old, new in used_renames.items()})
    if not used:
        return result, f"{where} has other names for its experts; {len(used_renames)} tensors are read under the base's"
    described = "all experts of a layer in one tensor" if fused_here else "each expert by itself"
    return result, f"{where} holds {described}; its rows are read as the base's {len(mapped)} expert tensors"


def _pieces(fused: str, tensors: Mapping[str, Logical], among: set[str]) -> list[str]:
    """The keys of the per-expert tensors, in the order of the rows of `fused`; [] unless experts 0,
    1, 2 ... are all there.
    """
    match = _FUSED.match(fused)
    assert match is not None
    experts = match["experts"]
    for place in dict.fromkeys(experts.replace(fused_part, part, 1) for fused_part, part in _PLACES):
        for projections in _PROJECTIONS[match["projection"]]:
            if f"{place}.0.{projections[0]}.weight" not in among:
                continue
            names: list[str] = []
            for number in range(len(tensors)):
                here = [f"{place}.{number}.{projection}.weight" for projection in projections]
                if not all(name in among for name in here):
                    break
                names += here
            return names
    return []


def _expected_shape(pieces: Mapping[str, Logical], fused: str) -> tuple[int, ...] | None:
    """The shape of the fused tensor made of `pieces`; None when these differ among themselves."""
    shapes = {shape_of(piece) for piece in pieces.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return None
    per_expert = 2 if fused.endswith("gate_up_proj") else 1
    return len(pieces) // per_expert, per_expert * shape[0], shape[1]


def _check_shapes(fused: str, tensor: Logical, pieces: Mapping[str, Logical], where: str) -> None:
    expected = _expected_shape(pieces, fused)
    if expected == shape_of(tensor):
        return
    raise UnsupportedError(
        f"`{fused}` and the single experts of the other checkpoint cannot be mapped onto each other with certainty ({where})",
        details=[
            f"fused     {list(shape_of(tensor))}",
            f"expected  {list(expected) if expected else 'experts of one shape'}",
        ],
        hint="transposed or incomplete experts are not mapped: save all checkpoints with the same version of the software",
    )


def _slices(fused: str, tensor: Logical, pieces: Mapping[str, Logical], where: str) -> dict[str, Logical]:
    """Rows of a fused tensor as tensors of their own."""
    _check_shapes(fused, tensor, pieces, where)
    if not isinstance(tensor, Stored):
        raise UnsupportedError(
            f"`{fused}` in {where} is quantized ({dtype_of(tensor)}) and fused, the base holds single experts: not mapped",
            hint="use a fused checkpoint as the base:  --base PATH",
        )
    slices: dict[str, Logical] = {}
    start = tensor.info.start
    for name, piece in pieces.items():
        rows, columns = shape_of(piece)
        size = DTYPES[tensor.info.dtype].num_bytes(rows * columns)
        slices[name] = Stored(tensor.file, tensor.name, TensorInfo(tensor.info.dtype, (rows, columns), start, start + size))
        start += size
    return slices


def _stack(fused: str, base: Logical, pieces: Mapping[str, Logical], where: str) -> Stacked:
    """Tensors below each other as one fused tensor."""
    _check_shapes(fused, base, pieces, where)
    if isinstance(base, Coded):
        raise UnsupportedError(
            f"`{fused}` in the base is quantized ({dtype_of(base)}) and fused, {where} holds single experts: not mapped",
            hint=f"use that checkpoint as the base:  --base {where}",
        )
    return Stacked(shape_of(base), tuple(piece for piece in pieces.values() if not isinstance(piece, Stacked)))


def _renames(missing: set[str], extra: set[str], among: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Old name -> new name, for what is renamed along with the experts of a layer, in both
    directions.
    """
    renames: dict[str, str] = {}
    for per_expert, fused in among:
        for old, new in ((per_expert, fused), (fused, per_expert)):
            for key in sorted(extra - renames.keys()):
                if old in key and (to := key.replace(old, new)) in missing and to not in renames.values():
                    renames[key] = to
    return renames
