"""The quantization section of config.json may hold any JSON: a setting, or an error that names it."""

from typing import Any

import pytest

from merge_cli.errors import UnsupportedError
from merge_cli.formats.quantization.config import read_settings

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}
ODD: tuple[Any, ...] = (True, 3, "x", [], [[]], None, {"a": 1}, float("inf"), -1, 10**400)


def groups(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {**GROUP, **changes}}}


def weights(**changes: Any) -> dict[str, Any]:
    return groups(weights={"num_bits": 4, "type": "int", **changes})


SECTIONS: dict[str, Any] = {
    "section": lambda value: value,
    "quant_method": lambda value: {"quant_method": value},
    "config_groups": lambda value: {"quant_method": "compressed-tensors", "config_groups": value},
    "transform_config": lambda value: {**groups(), "transform_config": value},
    "sparsity_config": lambda value: {**groups(), "sparsity_config": value},
    "group": lambda value: {"quant_method": "compressed-tensors", "config_groups": {"g": value}},
    "targets": lambda value: groups(targets=value),
    "weights": lambda value: groups(weights=value),
    "num_bits": lambda value: weights(num_bits=value),
    "group_size": lambda value: weights(group_size=value),
    "block_structure": lambda value: weights(block_structure=value),
    "format": lambda value: {**groups(), "format": value},
    "weight_block_size": lambda value: {"quant_method": "fp8", "weight_block_size": value},
    "side": lambda value: {"quant_method": "fp8", "weight_block_size": [128, value]},
    "kv_cache_scheme": lambda value: {**groups(), "kv_cache_scheme": value},
}


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:10])
@pytest.mark.parametrize("where", SECTIONS)
def test_any_value_is_read_or_refused(where: str, value: Any) -> None:
    try:
        read_settings({"quantization_config": SECTIONS[where](value)})
    except UnsupportedError as error:
        assert error.message.startswith("config.json declares a quantization that cannot be averaged: ")
        assert len(error.message) < 300


def test_one_target_may_be_a_string() -> None:
    assert read_settings({"quantization_config": groups(targets="Linear")}).groups[0].targets == ("Linear",)
