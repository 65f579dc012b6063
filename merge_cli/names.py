"""The names of pmerge's own files."""

from __future__ import annotations

MANIFEST = "pmerge.json"
SWEEP_REPORT = "sweep.json"
STAGING_SUFFIX = ".pmerge-partial"
