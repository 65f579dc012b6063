"""Which stored tensors make up which quantized tensor, from names, dtypes and shapes alone (no
torch).

Every stored tensor ends up in one of three places: a part of a quantized tensor, an activation
scale, or plain. What looks quantized but cannot be read, codes without a scale and scales without
codes raise UnsupportedError with the scheme, the tensor and what to do. Names alone never make a
tensor quantized: `logit_scale`, `attn.scale` and `layer_scale.weight` in BF16 are plain.

Two passes keep 150,000 tensors within about a second: one over all names with cheap tests, one over
those that pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_cli.errors import UnsupportedError
from merge_cli.formats.quantization.codec import Found, QuantizedTensor, StoredLike
from merge_cli.formats.quantization.config import TO_BF16, Settings, read_settings
from merge_cli.formats.quantization.schemes import Candidate, Match, codec_of

_CODE_DTYPES = frozenset({"F8_E4M3", "F4", "I8", "U8"})
_ONLY_QUANTIZED = ("F8_", "F6_", "F4")
_SUFFIXES = (
    "scale", "scale_inv", "scales", "scale_2", "_packed", "_blocks", "_zero_point", "_shape", "_g_idx", "_scale_ub",
    "qscale_weight", "qscale_act", "qweight", "qzeros", "SCB", "absmax", "bitsandbytes__nf4",
    "bitsandbytes__fp4", "W_q", "q_weight", "_data", "bitmask", ".blocks",
)  # fmt: skip
_FOREIGN = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "SCB": "bitsandbytes int8",
    "absmax": "bitsandbytes 4-bit",
    "bitsandbytes__nf4": "bitsandbytes 4-bit",
    "bitsandbytes__fp4": "bitsandbytes 4-bit",
    "W_q": "HQQ",
    "q_weight": "EXL2",
    "_data": "quanto",
    "bitmask": "compressed-tensors sparse bitmask",
    "pre_quant_scale": "ModelOpt AWQ (activations are rescaled before the weight)",
    "weight_g_idx": "compressed-tensors with activation ordering (`weight_g_idx`)",
}
_MARKERS = frozenset({*_FOREIGN, "scales", "blocks"})
_ONLY_INTEGER = frozenset({"qweight", "qzeros", "W_q", "q_weight", "bitmask"})
_INTEGERS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})
_ACTIVATIONS = frozenset({
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "output_scale", "output_zero_point",
    "activation_scale", "qscale_act",
})  # fmt: skip
_CACHES = frozenset({"k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale"})
_COMPANIONS = (
    ("scale", "_scale_inv"),
    ("scale", "_scale"),
    ("zero", "_zero_point"),
    ("shape", "_shape"),
    ("global_scale", "_global_scale"),
    ("global_scale", "_scale_2"),
)
_LEFTOVERS = (
    "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_packed", "weight_shape",
    "qscale_weight", "_proj_scale",
)  # fmt: skip


def find_quantized(tensors: Mapping[str, StoredLike], config: Mapping[str, Any]) -> Found:
    """Pair codes with scales in one checkpoint: `tensors` by stored name (over all shards), parsed
    config.json.

    Raises UnsupportedError, naming scheme and tensor, for whatever is quantized and cannot be read.
    """
    suspects = [
        name
        for name, stored in tensors.items()
        if stored.dtype in _CODE_DTYPES or stored.dtype.startswith(_ONLY_QUANTIZED) or name.endswith(_SUFFIXES)
    ]
    try:
        settings = read_settings(config)
    except UnsupportedError:
        if suspects:
            raise
        return Found(leftover_config=True)
    found: dict[str, QuantizedTensor] = {}
    owner: dict[str, str] = {}
    for name in suspects:
        if name.rpartition(".")[2] in _MARKERS:
            _refuse_foreign(name, tensors)
    matches: dict[Any, Match] = {}
    for candidate in _candidates(suspects, tensors, settings):
        tensor = _pair(candidate, settings, matches)
        if tensor.name in found or (tensor.name in tensors and tensor.name != tensor.parts[0][1]):
            raise _refused(candidate.what, tensor.name, "the checkpoint holds it both plain and quantized")
        found[tensor.name] = tensor
        for _, stored_name in tensor.parts:
            if stored_name in owner:
                raise _refused(candidate.what, stored_name, f"it belongs to `{tensor.name}` and `{owner[stored_name]}`")
            owner[stored_name] = tensor.name
    activations = _leftovers(suspects, tensors, settings, found, owner)
    if not found:  # scales of caches and activations belong to no quantized tensor here, and are tensors like others
        return Found(leftover_config=bool(settings.method) and not activations)
    return Found(found, owner, activations)


def _candidates(suspects: list[str], tensors: Mapping[str, StoredLike], settings: Settings) -> Iterator[Candidate]:
    """Codes with everything stored for them; FP8 last, since F8_E4M3 tensors may be the scales of
    other codes.
    """
    taken: set[str] = set()
    fp8 = []
    for name in suspects:
        stored = tensors[name]
        if stored.dtype == "F8_E4M3":
            fp8.append(name)
            continue
        candidate = None
        if name.endswith("_packed") and stored.dtype in ("I32", "U8"):
            candidate = _candidate(name.removesuffix("_packed"), name, tensors)
        elif name.endswith("_blocks") and stored.dtype == "U8":
            logical = name.removesuffix("_blocks")
            scales = f"{logical}_scales"
            if scales in tensors:
                candidate = Candidate(logical, name, {"scale": scales}, tensors, transposed=True)
        elif stored.dtype in _CODE_DTYPES and (settings.method or name.endswith(".weight")):
            candidate = _candidate(name, name, tensors)
            candidate = candidate if "scale" in candidate.companions else None
        if candidate is not None:
            taken.update(candidate.companions.values())
            yield candidate
    for name in fp8:
        if name not in taken and not _is_scale(name):
            yield _candidate(name, name, tensors)


def _candidate(logical: str, codes: str, tensors: Mapping[str, StoredLike]) -> Candidate:
    """The codes `codes` of tensor `logical` with the companions that exist, by role."""
    companions: dict[str, str] = {}
    for role, suffix in _COMPANIONS:
        name = logical + suffix
        if name in tensors:
            _add(companions, role, name, logical)
    if logical.endswith(".weight"):
        module = logical.removesuffix("weight")
        for last in ("scale", "qscale_weight"):
            if module + last in tensors:
                _add(companions, "scale", module + last, logical)
    return Candidate(logical, codes, companions, tensors)


def _add(companions: dict[str, str], role: str, name: str, logical: str) -> None:
    if role in companions:
        raise _refused("quantized", logical, f"more than one {role} tensor: {companions[role]}, {name}")
    companions[role] = name


def _pair(candidate: Candidate, settings: Settings, matches: dict[Any, Match]) -> QuantizedTensor:
    """The quantized tensor of `candidate`; tensors that look alike in all but name are matched
    once.
    """
    if "scale" not in candidate.companions:
        raise _refused(candidate.what, candidate.codes, "its scale is missing", scale_hint=True)
    alike: tuple[object, ...] = candidate.signature()
    if len(settings.groups) > 1:
        alike = (*alike, candidate.logical)
    match = matches.get(alike)
    if match is None:
        match = matches[alike] = codec_of(candidate, settings)
    shape, codec, roles = match
    parts = (("codes", candidate.codes), *((role, candidate.companions[role]) for role in roles))
    return QuantizedTensor(candidate.logical, shape, parts, codec)


def _leftovers(
    suspects: list[str],
    tensors: Mapping[str, StoredLike],
    settings: Settings,
    found: Mapping[str, QuantizedTensor],
    owner: Mapping[str, str],
) -> tuple[str, ...]:
    """Activation scales among what no quantized tensor owns; raises for codes and scales that are
    left over.
    """
    activations = []
    quantized = bool(owner or settings.method)
    for name in suspects:
        if name in owner:
            continue
        module, _, last = name.rpartition(".")
        stored = tensors[name]
        if quantized and _is_activation(module, last, settings, found):
            activations.append(name)
        elif stored.dtype.startswith(_ONLY_QUANTIZED):
            if _is_scale(name):
                raise _refused(stored.dtype, name, "it is a scale without codes", scale_hint=True)
            raise _refused(stored.dtype, name, "it has no scale, or its format is not read", scale_hint=True)
        elif name.endswith("_scale_inv") or (quantized and last.endswith(_LEFTOVERS)):
            raise _refused("quantized", name, "the codes that it belongs to are missing", scale_hint=True)
        elif stored.dtype in ("U8", "I32") and name.endswith(("_packed", "_blocks", "_scales")):
            raise _refused("packed", name, "its scale or its codes are missing", scale_hint=True)
        elif quantized and stored.dtype in _CODE_DTYPES and last == "weight" and len(stored.shape) > 1:
            raise _refused(stored.dtype, name, "it has no scale, or its format is not read", scale_hint=True)
    return tuple(activations)


def _is_scale(name: str) -> bool:
    return name.endswith(("scale", "scale_inv", "scales"))


def _is_activation(module: str, last: str, settings: Settings, found: Mapping[str, QuantizedTensor]) -> bool:
    """Calibrated scale of the activations of a quantized module, or of a KV cache that the config
    quantizes.

    Elsewhere a name such as `k_scale` may be a learned parameter, which must not be left out of an
    output.
    """
    if last in _CACHES and settings.kv_cache:
        return True
    if last in _ACTIVATIONS or last in _CACHES:
        return f"{module}.weight" in found
    return f"{module}.{last}".removesuffix("_activation_scale").removesuffix("_input_scale") in found


def _refuse_foreign(name: str, tensors: Mapping[str, StoredLike]) -> None:
    """Raise UnsupportedError if `name` marks a scheme that is not read (where a name is not enough:
    and its dtype).
    """
    module, _, last = name.rpartition(".")
    dtype = tensors[name].dtype
    weight = tensors.get(f"{module}.weight")
    scheme = _FOREIGN.get(last)
    if last in _ONLY_INTEGER and dtype not in _INTEGERS:
        scheme = None
    elif last == "absmax":
        scheme = scheme if module in tensors and tensors[module].dtype == "U8" else None
    elif last == "SCB":
        scheme = scheme if weight is not None and weight.dtype == "I8" else None
    elif last == "_data":
        scheme = scheme if module.endswith("weight") else None
    elif last in ("scales", "blocks") and dtype == "U8":
        scheme = "gpt-oss in its original layout"
    elif last == "scales" and weight is not None and weight.dtype == "U32":
        scheme = "MLX"
    if scheme is not None:
        raise _refused(scheme, name, "the scheme is not read")


def _refused(scheme: str, name: str, why: str, *, scale_hint: bool = False) -> UnsupportedError:
    hint = TO_BF16
    if scale_hint:
        hint = "check that all shards are there; if they are, " + TO_BF16
    return UnsupportedError(f"cannot average the {scheme} tensor `{name}`: {why}", hint=hint)
