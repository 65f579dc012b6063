"""What config.json says about quantization, and what a config of a dequantized checkpoint must no
longer say.

Names and dtypes in the headers decide what a tensor is; the config adds what they cannot show:
block sizes, bit widths, whether scales are powers of two. A method that pmerge does not read is
refused here, by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.errors import UnsupportedError

QUANTIZATION_SIDE_FILES = ("hf_quant_config.json",)
"""Files beside the weights that describe the quantized form; a dequantized checkpoint must not
carry them.
"""

TO_BF16 = (
    "average the BF16 checkpoints that these were quantized from, or convert each to BF16 "
    "with the tool that wrote it and average those"
)

_KEYS = ("quantization_config", "compression_config")
_READABLE = frozenset({"fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "compressed-tensors", "modelopt"})
_REFUSED_FORMATS = {
    "mxfp6-pack-quantized": "MXFP6",
    "marlin-24": "Marlin 2:4 sparse",
    "sparse-bitmask": "sparse bitmask",
    "sparse-24-bitmask": "2:4 sparse bitmask",
}


@dataclass(frozen=True, slots=True)
class Group:
    """How one config group of compressed-tensors quantizes weights."""

    num_bits: int
    is_float: bool
    symmetric: bool
    group_size: int | None
    block: tuple[int, int] | None
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """The quantization config, as far as pairing needs it. `method` is empty if there is none.

    block: FP8 block size; ue8m0: scales are powers of two; groups: those of compressed-tensors;
    kv_cache: the KV cache has calibrated scales; restricted_int4: Kimi's codes -7..7 (its config
    does not say so).
    """

    method: str = ""
    block: tuple[int, int] | None = None
    ue8m0: bool = False
    groups: tuple[Group, ...] = ()
    kv_cache: bool = False
    restricted_int4: bool = False


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Settings from a parsed config.json; raises UnsupportedError naming a method that cannot be
    read.
    """
    found = [section for section in _sections(config) if section]
    if "quantization" in config and not found:
        raise _refused("MLX quantization (`quantization` in config.json)")
    if not found:
        return Settings()
    methods = {_method(section) for section in found}
    if len(methods) > 1:
        raise _refused("more than one method: " + ", ".join(sorted(methods)))
    (method,) = methods
    section = found[0]
    if method not in _READABLE:
        raise _refused(f"quant_method `{method:.40}`")
    groups = tuple(_groups(section)) if method == "compressed-tensors" else ()
    block = section.get("weight_block_size") or next((group.block for group in groups if group.block), None)
    return Settings(
        method=method,
        block=_pair(block),
        ue8m0=section.get("scale_fmt") == "ue8m0" or method == "mxfp8",
        groups=groups,
        kv_cache=bool(section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo")),
        restricted_int4=any(name.startswith("kimi_k") for name in _model_types(config)),
    )


def without_declared_quantization(params: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed params.json (Mistral's format) without the section that declares quantized weights."""
    return {key: value for key, value in params.items() if key != "quantization"}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of a parsed config.json without its quantization sections, at any depth
    (`text_config` too).
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(item) for key, item in value.items() if key not in _KEYS}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    copied: dict[str, Any] = cleaned(config)
    return copied


def _sections(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every quantization section, outermost first."""
    if not isinstance(value, Mapping):
        return
    for key in _KEYS:
        if isinstance(value.get(key), Mapping):
            yield value[key]
    for key, item in value.items():
        if key not in _KEYS:
            yield from _sections(item)


def _model_types(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("model_type"), str):
            yield value["model_type"]
        for item in value.values():
            yield from _model_types(item)


def _method(section: Mapping[str, Any]) -> str:
    method = str(section.get("quant_method") or ("compressed-tensors" if "config_groups" in section else "unknown"))
    return "modelopt" if method.startswith("modelopt") else method


def _groups(section: Mapping[str, Any]) -> Iterator[Group]:
    """The config groups that quantize weights; raises UnsupportedError for formats and transforms
    that are not read, and for values of another type than expected.
    """
    if _mapping(section, "transform_config").get("config_groups"):
        raise _refused("compressed-tensors with rotated weights (`transform_config`)")
    groups = list(_mapping(section, "config_groups").values())
    if not all(isinstance(group, Mapping) for group in groups):
        raise _refused("compressed-tensors with preset names in `config_groups`")
    for holder in (section, _mapping(section, "sparsity_config"), *groups):
        name = holder.get("format")
        if isinstance(name, str) and name in _REFUSED_FORMATS:
            raise _refused(f"compressed-tensors format `{name}` ({_REFUSED_FORMATS[name]})")
    for group in groups:
        weights = _mapping(group, "weights")
        if weights:
            size, targets = weights.get("group_size"), group.get("targets") or ()
            yield Group(
                num_bits=_whole(weights, "num_bits", 8),
                is_float=weights.get("type", "int") == "float",
                symmetric=bool(weights.get("symmetric", True)),
                group_size=int(size) if isinstance(size, int) and size > 0 else None,
                block=_pair(weights.get("block_structure")),
                targets=tuple(map(str, targets)) if isinstance(targets, list | tuple) else (str(targets),),
            )


def _mapping(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, empty if there is none."""
    value = section.get(key) or {}
    if not isinstance(value, Mapping):
        raise _refused(f"`{key}` is {value!r:.40}, no object")
    return value


def _whole(section: Mapping[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if type(value) is not int:
        raise _refused(f"`{key}` is {value!r:.40}, no whole number")
    return value


def _pair(value: Any) -> tuple[int, int] | None:
    """A block size from [128, 128] or "128x128"; None if there is none; raises UnsupportedError if
    it is no pair.
    """
    if value is None:
        return None
    parts = value.split("x") if isinstance(value, str) else value
    try:
        rows, cols = (int(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        rows = cols = 0
    if rows < 1 or cols < 1:
        raise _refused(f"block size {value!r:.40}")
    return rows, cols


def _refused(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"config.json declares a quantization that cannot be averaged: {what}",
        details=["readable: " + ", ".join(sorted(_READABLE))],
        hint=TO_BF16,
    )
