"""Quantized checkpoints: stored tensors to float32 and back, a codec per scheme.

`find_quantized` pairs codes with their scales from headers alone and imports no torch; a `Codec`
turns bytes into float32 rows and rows into bytes. A scale is never averaged by itself. See
`codec.py` for the contract.
"""

from merge_cli.formats.quantization.codec import Codec, Found, QuantizedTensor, Stored, StoredLike
from merge_cli.formats.quantization.config import (
    QUANTIZATION_SIDE_FILES,
    without_declared_quantization,
    without_quantization,
)
from merge_cli.formats.quantization.pairing import find_quantized

__all__ = [
    "QUANTIZATION_SIDE_FILES",
    "Codec",
    "Found",
    "QuantizedTensor",
    "Stored",
    "StoredLike",
    "find_quantized",
    "without_declared_quantization",
    "without_quantization",
]
