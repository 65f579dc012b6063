"""The report: one file, the same bytes for the same ledger, well-formed, and with the ledger's
numbers in it.
"""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_cli.errors import OutputError, UsageError
from merge_cli.features.report import report
from merge_cli.request.methods import coefficients
from merge_cli.trajectory import svg
from merge_cli.trajectory.analysis import analyze_grams
from merge_cli.trajectory.folder import Run, Stop, write_analysis, write_run
from merge_cli.trajectory.gram import Gram
from merge_cli.trajectory.groups import Group
from merge_cli.trajectory.ledger import Ledger, Part, Row, key_of
from merge_cli.trajectory.plane import fit
from merge_cli.trajectory.plans import make_plan
from merge_cli.trajectory.svg import cells

STEPS = list(range(1000, 10_001, 250))


def loss(steps: list[int], values: tuple[float, ...]) -> float:
    return 2.0 + 0.13 * sum(c * c for c in values) + sum(c * 2e-5 * (10_000 - t) for c, t in zip(values, steps, strict=True))


def fill(folder: Path, plans: tuple[str, ...] = ("auto",), name: str = "ckpt_", n: int = 12, layers: int = 4) -> None:
    """A ledger with these plans, and an analysis of the last `n` checkpoints."""
    ledger = Ledger(folder)
    clock = 0.0
    for plan in plans:
        for entry in make_plan(plan, STEPS):
            steps = [entry["at"] - i * entry.get("every", 1) for i in reversed(range(entry["last"]))]
            values = coefficients(entry["method"], steps).values
            parts = tuple(Part(f"{name}{step}", step, "v", value) for step, value in zip(steps, values, strict=True))
            clock += 1
            key = key_of(parts, "keep", "cmd")
            ledger.append(Row(key, entry["name"], parts, "keep", "cmd", {"loss": loss(steps, values)}, time=clock, host="h"))
    write_run(folder, Run(f"/data/{name}run", tuple(Stop(f"{name}{step}", step) for step in STEPS)))
    rng = np.random.default_rng(0)
    grams = {}
    for layer in (None, *range(layers)):
        for kind in ("attention", "MLP", "norm") if layer is not None else ("embedding", "head"):
            x = rng.normal(size=(n, 50))
            grams[Group(layer, kind)] = Gram(((x - x[-1]) @ (x - x[-1]).T).tolist(), 100.0, 50)
    steps = [10_000 - 100 * i for i in reversed(range(n))]
    write_analysis(folder, analyze_grams([f"{name}{s}" for s in steps], steps, coefficients("sma", steps), grams))


class Tags(html.parser.HTMLParser):
    """The tags that are open, each attribute, and whether all of them were closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def check(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.wrong == []
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    ids = [value for _, name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for chart in charts:
        root = ET.fromstring(chart)
        words = {element.get("id"): element.text for element in root if element.tag in ("title", "desc")}
        assert root.get("role") == "img" and all(words[name] for name in (root.get("aria-labelledby") or "").split())
        assert "nan" not in chart and "inf" not in chart
    outside = [each for each in tags.attributes if each[1] in ("src", "href", "srcset", "action") or "http" in each[2]]
    assert outside == [] and "@import" not in text and "url(" not in text
    return tags


def data_of(text: str) -> dict[str, Any]:
    (embedded,) = re.findall(r'<script type="application/json" id="pmerge-data">(.*?)</script>', text, re.S)
    data: dict[str, Any] = json.loads(embedded)
    return data


def test_the_report_is_one_file_without_network_and_has_all_panels(tmp_path: Path) -> None:
    fill(tmp_path / "l", ("auto", "rolling", "pairs", "plane", "grid"))
    path = report("run", tmp_path / "r.html", ledger=tmp_path / "l", anneal=1000)
    text = path.read_text()
    check(text)
    assert text.count("<svg") == 8 and text.count("Not shown:") == 8
    assert [path.name for path in tmp_path.iterdir()] and "equivalent" not in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:3] == [
        "Loss, merges and the forecast",
        "Gain by number of checkpoints and spacing",
        "Where the checkpoints differ",
    ]


def test_the_same_ledger_gives_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "l")
    one = report("run", tmp_path / "a.html", ledger=tmp_path / "l").read_bytes()
    assert report("run", tmp_path / "b.html", ledger=tmp_path / "l").read_bytes() == one
    assert report("run", tmp_path / "a.html", ledger=tmp_path / "l").read_bytes() == one


def test_numbers_are_those_of_the_ledger(tmp_path: Path) -> None:
    fill(tmp_path / "l")
    rows = Ledger(tmp_path / "l").rows()
    text = report("run", tmp_path / "r.html", ledger=tmp_path / "l").read_text()
    data = data_of(text)
    assert [(row["key"], row["metrics"]) for row in data["rows"]] == [(row.key, dict(row.metrics)) for row in rows]
    losses = {row.key: row.metrics["loss"] for row in rows}
    now = data["forecast"]["now"]
    assert now["value"] == pytest.approx(sum(weight * losses[key] for key, weight in now["quantity"]["rows"].items()))
    assert f"{now['value']:.4f}" in text
    for row in rows:
        assert f"{row.metrics['loss']:.5f}" in text and row.key[:12] in text


def test_64_checkpoints_and_100_layers_stay_below_a_megabyte(tmp_path: Path) -> None:
    fill(tmp_path / "l", ("auto", "rolling", "grid"), n=64, layers=100)
    path = report("run", tmp_path / "r.html", ledger=tmp_path / "l")
    check(path.read_text())
    assert path.stat().st_size < 1_000_000


def test_odd_names_stay_text(tmp_path: Path) -> None:
    fill(tmp_path / "l", name="</script><script>alert(1)</script>&\"'")
    text = report("run", tmp_path / "r.html", ledger=tmp_path / "l").read_text()
    tags = check(text)
    assert "<script>" not in text and next(each for each in tags.attributes if each[0] == "script")[2] == "application/json"


def test_refusals_leave_measured_values(tmp_path: Path) -> None:
    fill(tmp_path / "l")
    rows = [replace(row, metrics={"acc": row.metrics["loss"]}) for row in Ledger(tmp_path / "l").rows()]
    for row in rows:
        Ledger(tmp_path / "m").append(row)
    text = report("run", tmp_path / "r.html", ledger=tmp_path / "m").read_text()
    check(text)
    assert "No forecast, benchmark" in text and "annealed, at equal tokens" not in text
    with pytest.raises(UsageError, match="there is no ledger"):
        report("run", tmp_path / "r.html", ledger=tmp_path / "none")
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(OutputError, match="is no report"):
        report("run", tmp_path / "mine.html", ledger=tmp_path / "l")
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(1.47, 1.83) == [1.5, 1.6, 1.7, 1.8]
    assert svg.ticks(3.0, 3.0) == [3.0]
    for low, high in ((1e-9, 3e-9), (-5.0, 17.0), (1e6, 1e6 + 1), (0.0, 123_456.0)):
        found = svg.ticks(low, high)
        assert 2 <= len(found) <= 6 and low - 1e-12 <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_a_quadratic_is_fitted_exactly_and_a_saddle_has_no_minimum() -> None:
    places = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.9), (0.5, 0.0), (0.25, 0.45), (0.75, 0.45), (0.5, 0.3)]

    def bowl(x: float, y: float) -> float:
        return 1.5 + (x - 0.4) ** 2 + 0.5 * (x - 0.4) * (y - 0.3) + 2 * (y - 0.3) ** 2

    found = fit(places, [bowl(*place) for place in places])
    assert found is not None and found.center == pytest.approx((0.4, 0.3)) and found.low == pytest.approx(1.5)
    for axis in found.axes(1.8):
        assert bowl(0.4 + axis[0], 0.3 + axis[1]) == pytest.approx(1.8)
    assert fit(places, [x * x - y * y for x, y in places]) is None
    assert fit([(0.0, 0.0)] * 7, [1.0] * 7) is None


def test_names_beside_cells_have_room_in_the_font_of_narrow_windows() -> None:
    names = ["embedding", "1000000", "x"]
    drawn = ET.fromstring(cells("c", "t", "d", names, names, [[1.0] * 3] * 3, lambda value: "#ffffff"))
    width = float(drawn.attrib["viewBox"].split()[2])
    texts = [each for each in drawn.iter() if each.tag.endswith("text")]
    assert len(texts) == 6
    for each in texts:
        x, y, long = float(each.attrib["x"]), float(each.attrib["y"]), 7.7 * len(each.text or "")  # a character of 13.5 pixels
        if "transform" in each.attrib:
            assert y - long * math.sin(math.radians(35)) > 8 and x + long * math.cos(math.radians(35)) < width
        else:
            assert x - long > 0
