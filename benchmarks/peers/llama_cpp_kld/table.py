"""Print the markdown table of compare.py's results. Usage: table.py RESULTS."""

import json
import sys
from pathlib import Path

rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
order = list(dict.fromkeys(row["preset"] for row in rows))
print("| preset | imatrix | tensors equal | KLD, r1q | KLD, llama-quantize | top-1 agreement | perplexity | MB |")
print("|--|--|--|--|--|--|--|--|")
for row in sorted(rows, key=lambda row: (order.index(row["preset"]), row["imatrix"])):
    ours, theirs, count = row["r1q"], row["llama_quantize"], row["tensors"]
    equal = count - len(row["different_tensors"])
    other = "same bytes" if theirs is None else f"{theirs['kld']:.6f}"
    print(
        f"| {row['preset']} | {'yes' if row['imatrix'] else 'no'} | {equal} of {count} | {ours['kld']:.6f} ± {ours['kld_error']:.6f} "
        f"| {other} | {ours['same_top_percent']:.1f} % | {ours['ppl']:.2f} | {row['bytes'][0] / 1e6:.1f} |"
    )
