"""Join the tensors of an output file into extents."""

from __future__ import annotations

from collections.abc import Iterable

from merge_cli.formats.weight_file import WeightFile
from merge_cli.planning.extent import Alike, Extent, Location, QuantizedExtent


class ExtentBuilder:
    """Joins the tensors of one output file into runs."""

    def __init__(self) -> None:
        self.extents: list[Extent | QuantizedExtent] = []
        self._alike: Alike | None = None
        self._kind = self._dtype = ""
        self._offset = self._count = self._end = 0
        self._sources: tuple[Location, ...] = ()
        self._next: list[tuple[WeightFile, int, str]] = []
        self._keys: list[str] = []
        self._starts: list[int] = []

    def add(
        self,
        key: str,
        kind: str,
        dtype: str,
        offset: int,
        end: int,
        count: int,
        sources: Iterable[tuple[Location, int]],
        alike: Alike | None = None,
    ) -> None:
        """Add a tensor of `count` elements for bytes `offset` to `end`; each source comes with its
        own size in bytes: all of them, or those of the first input of each kind in `alike`.
        """
        if not count:
            return
        pairs = list(sources)
        here = [(source.file, source.offset, source.dtype) for source, _ in pairs]
        if (kind, dtype, offset, alike) != (self._kind, self._dtype, self._end, self._alike) or here != self._next:
            self._close()
            self._kind, self._dtype, self._offset, self._alike = kind, dtype, offset, alike
            self._sources = tuple(source for source, _ in pairs)
        self._keys.append(key)
        self._starts.append(self._count)
        self._count += count
        self._end = end
        self._next = [(source.file, source.offset + size, source.dtype) for source, size in pairs]

    def add_quantized(self, extent: QuantizedExtent) -> None:
        """Add the run of a quantized tensor."""
        self._close()
        self.extents.append(extent)

    def finish(self) -> tuple[Extent | QuantizedExtent, ...]:
        self._close()
        return tuple(self.extents)

    def _close(self) -> None:
        if self._keys:
            self.extents.append(
                Extent(
                    self._kind,
                    self._dtype,
                    self._offset,
                    self._count,
                    self._all_sources(),
                    tuple(self._keys),
                    tuple(self._starts),
                )
            )
        self._keys, self._starts, self._count, self._next = [], [], 0, []

    def _all_sources(self) -> tuple[Location, ...]:
        alike = self._alike
        return self._sources if alike is None else tuple(self._sources[kind].moved(files) for kind, files in alike.of)
