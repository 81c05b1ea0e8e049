"""The report: hostile names stay text, labels never collide, and a browser draws it without asking anybody for anything.

The browser test needs Chromium and is skipped without it; the same page is read with html.parser and xml everywhere.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import random
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from click.testing import CliRunner

from r1q.benchmarks.formats import to_jsonl
from r1q.benchmarks.machine import Machine
from r1q.benchmarks.reasoning import Answers, Reasoning
from r1q.benchmarks.report import page
from r1q.benchmarks.report_axes import Scale, scale_of
from r1q.benchmarks.report_labels import Box, place_labels, shorten, text_width
from r1q.benchmarks.report_plots import Axis, Point, frontier, scatter
from r1q.benchmarks.result import BenchResult, Failure, Quality, Samples, Speed
from r1q.cli import main
from r1q.core.errors import UsageError

EVIL = "</text><script>document.title='owned'</script><img src=http://evil.invalid/x onerror=alert(1)>&\"'\x1b[31m"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
HERE = Machine(cpu="Some CPU", cores=2, logical=4, memory=8 << 30, system="Linux", features=("avx2",))


def result(grid: str, size: int, **changes: Any) -> BenchResult:
    rng = random.Random(grid)
    rate = 10 / size
    timing = Samples(tokens=100, seconds=tuple(100 / (rate * 1000 * rng.uniform(0.95, 1.05)) for _ in range(4)))
    kld = tuple(abs(rng.gauss(0.1, 0.02)) / size for _ in range(64))
    found = BenchResult(
        artifact=f"out/{grid}.gguf",
        name=f"Model-{grid}",
        format="gguf",
        grid=grid,
        bytes=size << 20,
        weights=1000,
        bits_per_weight=4.5,
        target="cpu",
        runtime="llama-cpp",
        device="cpu",
        threads=2,
        machine=HERE,
        versions={"r1q": "1"},
        command=("r1q", "bench", "a b"),
        time="2025-01-20T10:00:00+00:00",
        speed=Speed(
            load_seconds=1.0,
            context=512,
            first_token=timing,
            prefill=timing,
            decode=timing,
            base_memory=1 << 20,
            peak_memory=9 << 20,
        ),
        quality=Quality(
            text="t.txt", text_sha256="0", windows=1, length=129, first=64, nll=kld, kld=kld, same_top=(True,) * 64
        ),
        reasoning=reasoning(rng),
    )
    return dataclasses.replace(found, **changes)


def reasoning(rng: random.Random) -> Reasoning:
    count = 60
    columns: dict[str, Any] = {
        "problem": tuple(i // 2 for i in range(count)),
        "seed": tuple(i % 2 for i in range(count)),
        "right": tuple(rng.random() < 0.8 for _ in range(count)),
        "said": ("1",) * count,
        "thinking": tuple(rng.randint(20, 90) for _ in range(count)),
        "answer": (3,) * count,
        "truncated": (False,) * count,
        "loop": (False,) * count,
        "waits": (0,) * count,
        "seconds": (0.25,) * count,
    }
    how: dict[str, Any] = {"seeds": 2, "temperature": 0.6, "top_p": 0.95, "max_tokens": 99, "sequences": 1}
    return Reasoning(tasks="tiny", tasks_sha256="0", kinds=("sum",) * 30, answers=Answers(**columns), **how)


def some() -> list[BenchResult]:
    base = result("bf16", 16)
    assert base.reasoning is not None
    others = [result(grid, size) for grid, size in (("q8_0", 8), ("q4_k_m", 4), ("q4_0", 4), ("q2_k", 2))]
    held = [one.reasoning.compared("Model-bf16", base.reasoning.answers) for one in others if one.reasoning]
    return [base, *(dataclasses.replace(one, reasoning=r) for one, r in zip(others, held, strict=True))]


class Page(HTMLParser):
    """Counts elements, and keeps every attribute and every text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def svgs(text: str) -> list[Xml.Element]:
    return [Xml.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.S)]


def test_the_page_has_every_plot_and_every_number() -> None:
    text = page(some())
    found = Page(text)
    plots = svgs(text)
    assert len(plots) == 4 + 4  # four trades, and the thoughts of all but the float model
    assert [len(plot.findall("circle")) for plot in plots[:4]] == [5] * 4
    assert all(len(plot.findall("rect")) > 5 and len(plot.findall("polyline")) == 1 for plot in plots[4:])
    labels = [label.text for label in plots[0].findall("text") if label.get("class") == "label"]
    assert sorted(map(str, labels)) == ["bf16", "q2_k", "q4_0", "q4_k_m", "q8_0"]
    assert found.tags["tr"] == 6
    said = " ".join(" ".join(found.texts).split())
    for words in ("Against bf16", "25% of its size", "Some CPU", "r1q bench 'a b'", "right answers lost", "60 answers"):
        assert words in said


def test_the_page_asks_for_nothing() -> None:
    found = Page(page(some()))
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "a", "base"} & set(found.tags)
    assert not [
        entry for entry in found.attributes if entry[1] in ("src", "href", "style", "action") or entry[1][:2] == "on"
    ]
    assert "url(" not in page(some())
    assert "@import" not in page(some())
    policies = [value for tag, name, value in found.attributes if (tag, name) == ("meta", "content")]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies


def hostile() -> list[BenchResult]:
    first, *rest = some()
    evil = dataclasses.replace(
        rest[0],
        name=EVIL,
        grid=EVIL,
        artifact=EVIL,
        runtime=EVIL,
        command=(EVIL,),
        notes=(EVIL,),
        versions={EVIL: EVIL},
        machine=dataclasses.replace(HERE, cpu=EVIL, features=(EVIL,)),
        failures=(Failure(stage=EVIL, exit_code=3, message=EVIL),),
        reasoning=dataclasses.replace(rest[0].reasoning, tasks=EVIL, reference=EVIL) if rest[0].reasoning else None,
    )
    return [first, evil, *rest[1:]]


def test_hostile_names_stay_text() -> None:
    text = page(hostile())
    found = Page(text)
    assert not {"script", "img"} & set(found.tags)
    assert "\x1b" not in text
    assert sum("<script>" in words for words in found.texts) > 8  # it is all there to be read
    assert len(svgs(text)) == 8  # each still sound XML


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    bare = [dataclasses.replace(one, quality=None, reasoning=None) for one in some()]
    text = page([*bare[:1], *some()[1:]])
    assert "not measured: bf16" in text
    assert svgs(page(bare)) == []
    assert "Every number" in page(bare)
    with pytest.raises(UsageError, match="no results"):
        page([])
    nothing = [dataclasses.replace(one, speed=None, quality=None, reasoning=None) for one in some()]
    assert "Every number" in page(nothing)


def test_rows_that_look_alike_get_names_that_differ() -> None:
    two = [result("q4_0", 4), result("q4_0", 4, runtime="onnxruntime"), result("q4_0", 4, artifact="other/q4_0.gguf")]
    labels = [
        text.text for plot in svgs(page(two))[:1] for text in plot.findall("text") if text.get("class") == "label"
    ]
    assert len(set(labels)) == len(labels) == 3


@pytest.mark.runtime
def test_the_map_of_errors_is_the_manifests(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ["quantize", "--scheme", "q4_0", "-o", str(folder), "--quiet"]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    (gguf,) = folder.glob("*.gguf")
    text = page([result("q4_0", 4, artifact=str(gguf))])
    cells = [rect for plot in svgs(text) for rect in plot.findall("rect") if rect.get("class") == "cell"]
    told = {str(cell.findtext("title")) for cell in cells}
    tensors = json.loads((folder / "checkpoint" / "manifest.json").read_text())["tensors"]
    matrices = [t for t in tensors if t["layer"] is not None and t["error"] > 0]
    assert told == {f"{t['name']}: {t['error']:.3g} ({t['grid']})" for t in matrices}
    darkest = max(cells, key=lambda cell: float(cell.get("fill-opacity", "0")))
    assert str(darkest.findtext("title")).startswith(max(matrices, key=lambda t: t["error"])["name"])
    (folder / "checkpoint" / "manifest.json").write_text("{")
    assert 'class="cell"' not in page([result("q4_0", 4, artifact=str(gguf))])


@pytest.mark.parametrize("count", [2, 5, 12, 30])
@pytest.mark.parametrize("spread", [1.0, 60.0, 300.0])
def test_labels_never_collide(count: int, spread: float) -> None:
    rng = random.Random(f"{count}/{spread}")
    within = Box(60, 10, 370, 265)
    points = [(200 + rng.uniform(-0.5, 0.5) * spread, 130 + rng.uniform(-0.4, 0.4) * spread) for _ in range(count)]
    labels = [shorten("q4_k_m onnxruntime-genai" * rng.randint(0, 2) + "q8_0") for _ in points]
    found = place_labels(points, labels, within)
    boxes = [placed.box for placed in found if placed is not None]
    assert len(boxes) >= min(count, 4)
    assert all(within.holds(box) for box in boxes)
    assert not any(one.meets(other) for one, other in itertools.combinations(boxes, 2))
    for box in boxes:
        inside = [(x, y) for x, y in points if box.left < x < box.right and box.top < y < box.bottom]
        assert inside == []


def test_labels_keep_off_lines_where_they_can() -> None:
    line = Box(100, 100, 300, 100)
    (placed,) = place_labels([(200.0, 100.0)], ["q4_0"], Box(0, 0, 400, 300), [line])
    assert placed is not None
    assert not placed.box.meets(line)


def test_the_frontier_by_hand() -> None:
    less, more = Axis(title="", up=False), Axis(title="", up=True)
    places = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (4.0, 1.5)]
    points = [Point(label="", x=x, y=y, told="") for x, y in places]
    assert frontier(points, less, less) == [0, 1, 3]
    assert frontier(points, more, more) == [0, 2, 4]
    assert frontier(points[:1] * 2, less, less) == [0, 1]  # equals beat nobody


def test_scales_hold_their_values_and_name_round_ones() -> None:
    scale = scale_of([3.0, 980.0], 0, 100, log=False, zero=True)
    assert (scale.place(0), scale.place(scale.high)) == (0, 100)
    assert [words for _, words in scale.ticks()] == ["0", "200", "400", "600", "800", "1,000"]
    decades = scale_of([1e-6, 0.0, 0.3], 0, 100, log=True)
    assert [words for _, words in decades.ticks()] == ["10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]
    assert decades.place(0.0) == 0
    narrow = scale_of([0.011, 0.04], 0, 100, log=True)
    assert [words for _, words in narrow.ticks()] == ["0.01", "0.02"]
    flat = scale_of([5.0, 5.0], 0, 100, log=False)
    assert 0 < flat.place(5.0) < 100
    with pytest.raises(ValueError, match="values"):
        scale_of([0.0], 0, 1, log=True)
    assert Scale(0, 1, 0, 10, log=False).ticks()[0] == (0.0, "0.0")
    for low, high in ((0.02, 0.05), (84.0, 97.5), (0, 12345)):
        ticks = Scale(low, high, 0, 1, log=False).ticks()
        assert 3 <= len(ticks) <= 7
        assert len({words for _, words in ticks}) == len(ticks)


def test_many_points_are_all_drawn_and_the_nameless_are_told() -> None:
    points = [Point(label=f"a rather long label {i}", x=1.0, y=1.0, told="") for i in range(80)]
    svg, hidden = scatter("x", points, Axis(title="", up=True), Axis(title="", up=True))
    assert svg.count("<circle") == 80
    assert svg.count('class="label"') + len(hidden) == 80
    assert hidden


def test_the_command(tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    runs.write_text(to_jsonl(some()))
    output = tmp_path / "new" / "report.html"
    done = CliRunner().invoke(main, ["report", str(runs), str(runs), "-o", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(svgs(output.read_text(encoding="utf-8"))) >= 4
    runs.write_text("{}\n")
    assert CliRunner().invoke(main, ["report", str(runs), "-o", str(output)]).exit_code == 3


MEASURE = """<script>addEventListener('load', () => {
const where = e => e.getBoundingClientRect(), all = (e, what) => [...e.querySelectorAll(what)];
const boxes = all(document, 'svg').map(svg => all(svg, '.label').map(where));
const meet = boxes.flatMap(all => all.flatMap((a, i) => all.slice(i + 1).filter(
  b => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom))).length;
const texts = [...document.querySelectorAll('svg text')];
const outside = texts.filter(e => { const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
  return t.left < s.left - 1 || t.right > s.right + 1 || t.top < s.top - 1 || t.bottom > s.bottom + 1; }).length;
const drawn = [...document.querySelectorAll('circle, rect')].filter(e => e.getBoundingClientRect().width > 0).length;
document.body.textContent = JSON.stringify({meet, outside, drawn, wide: document.documentElement.scrollWidth,
  view: document.documentElement.clientWidth, title: document.title, labels: boxes.flat().length});
});</script>"""
FLAGS = (
    "--hide-scrollbars",
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
)  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_it_at_two_widths_and_asks_nobody(tmp_path: Path) -> None:
    text = page(hostile())
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    # The page itself has no script; a copy is given one that measures, and frames make it as narrow as a phone.
    measured = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace(
        "</main>", "</main>" + MEASURE
    )
    (tmp_path / "measured.html").write_text(measured, encoding="utf-8")
    frames = "".join(f'<iframe src="measured.html" width="{width}" height="900"></iframe>' for width in (390, 1200))
    script = "document.body.textContent=Array.from(frames).map(f=>f.document.body.textContent).join('\\n')"
    collect = f"<script>onload=()=>{{{script}}}</script>"
    (tmp_path / "frames.html").write_text(f"<meta charset=utf-8>{frames}{collect}", encoding="utf-8")
    dumped = browse(tmp_path, "--dump-dom", (tmp_path / "frames.html").as_uri())
    found = [json.loads(line) for line in re.findall(r'\{"meet".*?"labels":\d+\}', html.unescape(dumped))]
    assert len(found) == 2, dumped[-2000:]
    for one, width in zip(found, (390, 1200), strict=True):
        assert one["view"] == width
        assert one["wide"] <= width  # nothing to scroll sideways but the table's own frame
        assert (one["meet"], one["outside"]) == (0, 0), one
        assert one["drawn"] > 40
        assert one["labels"] >= 12
        assert one["title"].endswith("r1q bench")  # and not «owned»
    assert hosts_asked(tmp_path, tmp_path / "page.html") == set()
    curious = tmp_path / "curious.html"
    curious.write_text("<img src='http://evil.invalid/x'>")
    assert hosts_asked(tmp_path, curious) == {"evil.invalid"}  # so that one that asks would be seen


def hosts_asked(folder: Path, path: Path) -> set[str]:
    """Return the hosts that a page asks, without those that the browser asks for itself."""
    log = folder / f"{path.stem}.json"
    browse(folder, f"--log-net-log={log}", "--dump-dom", path.as_uri())
    text = log.read_text(encoding="utf-8", errors="replace")
    hosts = set(re.findall(r'"url":"(?:https?|wss?|ftp)://([^/"]+)', text))
    return {host for host in hosts if not host.endswith((".google.com", ".googleapis.com"))}


def browse(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1700,1000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_text_is_never_wider_than_thought() -> None:
    assert text_width("q4_k_m") > 6 * 6.5
    assert text_width("量化") > 2 * 12
    assert shorten("x" * 99).count("x") == 29
