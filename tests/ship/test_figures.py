"""The pictures of a card: drawn from results, whole by themselves, and each where the card says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from r1q.benchmarks.result import BenchResult
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.ship.figures import figures
from r1q.ship.parcel import pack

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/smollm2_135m.jsonl"
NAME = "Tiny-R1-4.9M-Q4_K_M"


@pytest.fixture
def checkpoint(output: Path) -> QuantizedCheckpoint:
    """Return the embedded model's checkpoint."""
    return QuantizedCheckpoint.open(output / "checkpoint")


def test_without_results_there_is_the_map_of_errors(checkpoint: QuantizedCheckpoint) -> None:
    (figure,) = figures([], checkpoint)
    assert figure.file == "plot-where-the-error-is.svg"
    cells = [mark for mark in Xml.fromstring(figure.svg).iter() if mark.get("class") == "cell"]
    # Six blocks of seven matrices each.
    assert len(cells) == 6 * 7
    assert "blk" in figure.caption or "layers." in figure.caption


def test_plots_bring_their_colours_along(checkpoint: QuantizedCheckpoint) -> None:
    results = [BenchResult.from_json(line) for line in RESULTS.read_text().splitlines()]
    drawn = figures(results, checkpoint)
    assert {"plot-size-and-divergence.svg", "plot-speed-and-divergence.svg"} <= {figure.file for figure in drawn}
    for figure in drawn:
        root = Xml.fromstring(figure.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        style = root.find("{http://www.w3.org/2000/svg}style")
        assert style is not None
        assert style.text is not None
        named, given = set(re.findall(r"var\((--\w+)\)", style.text)), set(re.findall(r"(--\w+):", style.text))
        assert named <= given
        assert style.text.count("prefers-color-scheme: dark") == 1
        # Nothing is fetched and nothing runs: it is shown on other people's pages.
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|href|@import|url\(", figure.svg)


def test_the_card_shows_every_picture(output: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines[-1] |= {"name": NAME}
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    packed = pack(output, "laptop", tmp_path / "p", results=tmp_path / "own.jsonl")
    card = (packed.path / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card)
    assert len(shown) >= 3
    assert set(shown) == {path.name for path in packed.path.glob("*.svg")}
