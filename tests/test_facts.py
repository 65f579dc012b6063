"""Facts that were once decided in several places are decided in one: a pattern of the decision, and
the files of the package that may hold it.
"""

import re

import pytest
from paths import PACKAGE

SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
FACTS = {
    "dtype of a sum": (r"dtype = \"F64\"|_SIGNIFICANT_BITS\b", {"planning/sums.py"}),
    "two passes": (r"\.needs_stats\b", {"planning/extent.py"}),
    "bytes of n elements": (r"\.bits // 8", {"formats/safetensors.py"}),
    "rounding to odd": (r"bitwise_and\(bits, 1", {"engine/arithmetic.py"}),
    "NaN and overflow messages": (r"has NaN or Inf in an input|overflows \{", {"engine/nonfinite.py"}),
    "name of the manifest": (r"[\"']pmerge\.json[\"']", {"names.py"}),
    "name of the staging folder": (r"[\"']\.pmerge-partial[\"']", {"names.py"}),
    "endings of other formats": (r"[\"']\.ckpt[\"']", {"names.py"}),
    "parsing of JSON": (r"json\.loads?\((?!json\.dumps)", {"system/json_text.py"}),
    "struct statfs": (r"\.f?statfs\(", {"system/files.py"}),
    "/ in names of records": (r"%2F\"\)", {"system/held.py"}),
    "publish sequence": (r"\.begin_to_publish\(\)", {"job.py"}),
    "default of --memory": (r"memory: int = ", {"request/spec.py"}),
    "adding statistics": (r"seconds_writing \+ ", {"engine/chunk.py"}),
    "fields of a request": (r"def describe\(", {"planning/record.py"}),
    "plan from a record": (r"def replan\(", {"planning/record.py"}),
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_is_decided_in_one_place(fact: str) -> None:
    pattern, places = FACTS[fact]
    assert {name for name, text in SOURCES.items() if re.search(pattern, text)} == places
