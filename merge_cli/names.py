"""The names of pmerge's own files, and the endings of those that it does not read."""

from __future__ import annotations

MANIFEST = "pmerge.json"
SWEEP_REPORT = "sweep.json"
STAGING_SUFFIX = ".pmerge-partial"
SWEEP_BEGUN = SWEEP_REPORT + STAGING_SUFFIX
"""The checkpoints that a sweep began with, until all its results are there."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".npz")
"""Endings of weights in formats other than safetensors."""


def is_below(name: str) -> bool:
    """Whether a recorded name is a path below the folder that it was recorded for."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))
