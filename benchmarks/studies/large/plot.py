"""Draw limited.sh's curve as an SVG file: plot.py CURVE.jsonl OUT.svg."""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 900, 420, 70, 50
LINES = {
    "anonymous": ("#c0392b", "anonymous memory of the process"),
    "group": ("#2c6fbb", "control group, page cache included"),
}


def thinned(points: list[dict[str, float]], most: int = 1200) -> list[dict[str, float]]:
    """Return at most so many points: the largest values of neighbours, at the time of the last."""
    step = -(-len(points) // most)
    groups = (points[start : start + step] for start in range(0, len(points), step))
    return [{key: max(row[key] for row in group) for key in group[0]} for group in groups]


def main(curve: Path, out: Path) -> None:
    """Write the picture: memory over time, and the limit."""
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    points = thinned([row for row in rows if "seconds" in row])
    limit = next((row["limit"] for row in rows if "limit" in row), 6 << 30)
    last, top = points[-1]["seconds"], limit * 1.1

    def place(seconds: float, size: float) -> str:
        return f"{LEFT + seconds / last * (WIDTH - LEFT - 20):.1f},{HEIGHT - 40 - size / top * (HEIGHT - 40 - TOP):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for gib in range(int(top / (1 << 30)) + 1):
        _x, y = place(0, gib << 30).split(",")
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4}" text-anchor="end">{gib} GiB</text>')
    for name, (colour, label) in LINES.items():
        path = " ".join(place(row["seconds"], row[name]) for row in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{LEFT + (0 if name == "anonymous" else 300)}" y="22" fill="{colour}">{label}</text>')
    y = place(0, limit).split(",")[1]
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="black" stroke-dasharray="6 4"/>')
    parts.append(f'<text x="{WIDTH - 24}" y="{float(y) - 6}" text-anchor="end">limit</text>')
    parts.append(f'<text x="{WIDTH - 24}" y="{HEIGHT - 14}" text-anchor="end">{last:.0f} s</text></svg>')
    out.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
