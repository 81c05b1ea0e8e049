#!/usr/bin/env bash
# Loads r1q's GPTQ folders with transformers and gptqmodel, in an environment of their own, and compares perplexities with r1q's own:
#   run.sh CHECKPOINT TEXT WORK     (PYTHON: the Python that has r1q; default python3)
# gptqmodel compiles its CPU kernel when it first loads a folder: about six minutes on two busy cores.
set -euo pipefail
[ $# = 3 ] || { echo "usage: run.sh CHECKPOINT TEXT WORK" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3} checkpoint=$(realpath "$1") text=$(realpath "$2") work=$3
mkdir -p "$work"
work=$(realpath "$work")
if [ ! -x "$work/env/bin/python" ]; then
  python3 -m venv "$work/env"
  # gptqmodel 7.7.0 names torch>=2.14.1; it runs with 2.13.0, so its own requirements are given here without that one.
  "$work/env/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt"
  "$work/env/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation gptqmodel==7.7.0
fi
for bits in 4 8; do
  "$python" -m r1q quantize "$checkpoint" --bits $bits --to gptq -o "$work/int$bits" -q
  "$python" "$here/ours.py" "$work/int$bits" "$text" "$work" | tee "$work/int$bits.jsonl"
  # The kernel that gptqmodel picks, in bfloat16; and its plain one in float32. torch.compile would only take minutes more.
  for how in "auto bfloat16" "gptq_torch float32"; do
    TORCHDYNAMO_DISABLE=1 "$work/env/bin/python" "$here/theirs.py" "$work/int$bits" "$work" $how 2>/dev/null \
      | grep '^{"side"' | tee -a "$work/int$bits.jsonl"
  done
done
