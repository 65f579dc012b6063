"""What a quantization scheme must do for the engine, and what pairing hands over.

A quantized tensor is stored as several tensors (its parts: codes, scales, zero points), which may
lie in different shards. The engine sees one logical tensor: a 2-D view of `rows` = product of all
dimensions but the last, and `columns` = the last one. It works through it in chunks of rows whose
first row is a multiple of `row_step`:

    read the bytes that `part_range` names, of every part -> `decode` -> float32 [rows, columns] ->
    averaged -> `encode` -> the bytes of the same `part_range`, of every part

Rules that every codec keeps (tests/formats/quantization/test_contract.py runs them over each):
- The same bits on any device and for any legal chunking.
- Codes and scales that mean NaN become NaN in float32, so that the engine's check for non-finite
  values finds them.
- Ranges of a part over consecutive chunks are consecutive, except for the roles in
  `per_tensor_roles` (a scale of the whole tensor, a stored shape): their range is all of the part
  in every chunk. Read them every time, write them once.
- Scratch memory is proportional to the chunk (see the constants below).

Schemes whose scale spans more than a chunk have `needs_stats`: a first pass over the merged values
calls `stats` for each chunk, combines the results with elementwise `torch.maximum`, and hands the
outcome to `encode`.

`base` is what makes requantizing faithful. It holds the parts of the base checkpoint (any one
input) for the same rows. A block whose merged values already lie on the base's grid keeps the
base's scale, so merging a checkpoint with itself gives its bytes back whatever rule once produced
its scales. Every other block, and every block when `base` is None, gets a new scale by the scheme's
published rule. Not guaranteed: the sign of a zero, where the averaging has lost it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]
"""Role -> bytes: a 1-D uint8 tensor for each part."""

Shape = tuple[int, ...]

DECODE_SCRATCH_BYTES = 8
"""Upper bound of scratch in `decode`, in bytes for each value of the chunk, the float32 result not
counted.
"""

ENCODE_SCRATCH_BYTES = 20
"""Upper bound of scratch in `encode` and `stats`, in bytes for each value, the encoded bytes
included.
"""


class StoredLike(Protocol):
    """What pairing needs to know of a stored tensor: its safetensors dtype name and its shape in
    the header.
    """

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor as pairing sees it: safetensors dtype name (`F8_E4M3`) and shape."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A logical tensor and the stored tensors that it is made of.

    `name` and `shape` are those of the dequantized tensor; `parts` are pairs of role and stored
    name, codes first. Equal for two checkpoints exactly if they are quantized alike.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, str], ...]
    codec: Codec


@dataclass(frozen=True, slots=True)
class Found:
    """What `find_quantized` found: stored names that are neither in `owner` nor activation scales
    are plain tensors.

    tensors: by logical name, in the order of the first stored part. owner: stored name -> logical
    name, for every part of every quantized tensor. activation_scales: stored names of calibrated
    scales of activations and KV caches (`input_scale`, `k_scale`, ...).
      They belong to the quantized form and describe one checkpoint's activations. A dequantized
      output leaves them out; a requantized one copies them if all inputs agree and otherwise has to
      be refused (calibrate anew). None where no tensor is quantized: they are tensors like others
      then.
    leftover_config: config.json declares a quantization of which the tensors show nothing.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    activation_scales: tuple[str, ...] = ()
    leftover_config: bool = False


class Codec(Protocol):
    """One scheme with its parameters; a frozen dataclass, equal if the stored layout and the rules
    are equal.
    """

    @property
    def scheme(self) -> str:
        """For people: `fp8 block 128x128`."""

    @property
    def needs_stats(self) -> bool:
        """Whether `encode` needs a first pass over all values of the tensor."""

    @property
    def per_tensor_roles(self) -> frozenset[str]:
        """Roles whose `part_range` is the whole part in every chunk."""

    def row_step(self, shape: Shape) -> int:
        """Rows that cannot be split: a chunk begins at a multiple of it and ends at one or at the
        last row.
        """

    def part_range(self, role: str, shape: Shape, r0: int, r1: int) -> tuple[int, int]:
        """The bytes [begin, end) of part `role` that rows r0..r1 need."""

    def decode(self, parts: Parts, shape: Shape, r0: int, r1: int) -> Tensor:
        """float32 [r1 - r0, columns] from exactly the bytes of `part_range`, on the device of the
        bytes.
        """

    def stats(self, values: Tensor, shape: Shape, r0: int, r1: int, *, base: Parts | None = None) -> Tensor:
        """float32 [3] for `encode`; combine chunks by elementwise maximum. `base` as in `encode`."""

    def encode(
        self,
        values: Tensor,
        shape: Shape,
        r0: int,
        r1: int,
        *,
        stats: Tensor | None = None,
        base: Parts | None = None,
    ) -> dict[str, Tensor]:
        """The bytes of `part_range` for every role from finite float32 [r1 - r0, columns].

        `stats` may be None where `needs_stats` is False, or where the chunk is the whole tensor.
        """
