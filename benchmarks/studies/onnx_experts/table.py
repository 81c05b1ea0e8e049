"""Print what `run.sh` measured, raw samples and no paths, as JSON lines; with --table the table of the page."""

import argparse
import json
from pathlib import Path

KEPT = ("runtime", "grid", "bytes", "machine", "versions")


def rows(work: Path) -> list[dict[str, object]]:
    """Return a row for each artifact in each runtime."""
    found: dict[tuple[str, str], dict[str, object]] = {}
    for path in sorted(work.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            result = json.loads(line)
            speed, quality = result["speed"], result["summary"]
            found[path.stem, result["runtime"]] = {
                "model": path.stem,
                **{key: result[key] for key in KEPT},
                "prefill": {key: speed["prefill"][key] for key in ("tokens", "seconds")},
                "decode": {key: speed["decode"][key] for key in ("tokens", "seconds")},
                "decode_512": {key: speed["deeper"][0][key] for key in ("tokens", "seconds")},
                "peak_memory": speed["peak_memory"],
                "mean_kld": quality["mean_kld"],
                "top1_agreement": quality["top1_agreement"],
            }
    return list(found.values())


def rate(timed: object) -> str:
    """Return the mean of tokens a second and the deviation of its samples."""
    assert isinstance(timed, dict)
    rates = [timed["tokens"] / seconds for seconds in timed["seconds"]]
    mean = sum(rates) / len(rates)
    return f"{mean:,.0f} ± {(sum((each - mean) ** 2 for each in rates) / (len(rates) - 1)) ** 0.5:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="run.sh's folder")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    for row in rows(asked.work):
        if not asked.table:
            print(json.dumps(row))
            continue
        kld = row["mean_kld"]
        assert isinstance(kld, dict)
        cells = [
            row["model"],
            row["runtime"],
            f"{int(str(row['bytes'])) / 1e6:.1f}",
            *(rate(row[key]) for key in ("prefill", "decode", "decode_512")),
        ]
        print("| " + " | ".join(map(str, [*cells, f"{kld['value']:.4f} ± {kld['error']:.4f}"])) + " |")
