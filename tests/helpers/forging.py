"""Change a result as somebody would who knows how the checksums of `pmerge.json` are made."""

import hashlib
import json
from pathlib import Path
from typing import Any

from merge_cli.output.manifest import seal


def reseal(out: Path, **changes: Any) -> None:
    """Change fields of `pmerge.json`."""
    content = json.loads((out / "pmerge.json").read_bytes())
    del content["sha256"]
    (out / "pmerge.json").write_bytes(seal(content | changes))


def record_again(out: Path) -> None:
    """Record the files that are there now, as they are."""
    found: dict[str, dict[str, Any]] = {"files": {}, "side_files": {}}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "pmerge.json"):
        data = path.read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        key = "files" if path.suffix in (".safetensors", ".distcp") else "side_files"
        found[key][path.relative_to(out).as_posix()] = entry
    reseal(out, **found)
