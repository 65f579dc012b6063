"""Addresses that were nearly right: one slash too few, the name of a cloud for its scheme, a page
of the Hub for its files.
"""

from __future__ import annotations

import re

_ONE_SLASH = re.compile(r"^(s3|gs|az|hf):/*([^/].*)$")
_HUB_NAME = re.compile(r"^([\w.-]+/[\w.-]+)(@[\w.*-]+)?$", re.ASCII)
_HUB_PAGE = re.compile(r"^https?://huggingface\.co/([\w.-]+/[\w.-]+)(?:/tree/([^/?#]+))?", re.ASCII)
_OTHER_NAMES = {"gcs": "gs", "s3a": "s3", "s3n": "s3", "huggingface": "hf", "abfs": "az"}


def meant_address(path: str) -> str | None:
    """The address that was probably meant by one that cannot be read; None for a path without
    likeness to one.
    """
    if found := _HUB_PAGE.match(path):
        return f"hf://{found[1]}@{found[2] or 'step*'}"
    if "://" not in path and (found := _ONE_SLASH.match(path)):
        return f"{found[1]}://{found[2]}"
    scheme, separator, rest = path.partition("://")
    return f"{_OTHER_NAMES[scheme]}://{rest}" if separator and scheme in _OTHER_NAMES else None


def name_on_the_hub(path: str) -> str | None:
    """The address of a model that is named as on the Hub (`org/name`, `org/name@step1000`); None
    for other names.
    """
    found = _HUB_NAME.match(path)
    return f"hf://{found[1]}{found[2] or '@step*'}" if found and ".." not in path else None
