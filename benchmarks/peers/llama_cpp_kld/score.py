"""llama-perplexity's figures of any GGUF file against reference logits, as one JSON line.

Usage: score.py TOOLS REFERENCE FILE; TOOLS is build.sh's folder, REFERENCE the logits that compare.py keeps in WORK/reference.logits.
Runs in r1q's environment.
"""

import json
import sys
from pathlib import Path

from compare import divergence

if __name__ == "__main__":
    tools, base, file = (Path(argument).resolve() for argument in sys.argv[1:])
    print(json.dumps({"bytes": file.stat().st_size} | divergence(tools / "bin", file, base)))
