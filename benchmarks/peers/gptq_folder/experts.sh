#!/usr/bin/env bash
# Opens r1q's GPTQ folders of tiny random models with experts in gptqmodel and compares logits:  experts.sh WORK
# (PYTHON: the Python that has r1q and transformers; default python3). WORK is run.sh's, whose environment is used.
set -euo pipefail
[ $# = 1 ] || { echo "usage: experts.sh WORK" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
work=$(realpath "$1")
[ -x "$work/env/bin/python" ] || { echo "$work has no environment yet: run.sh makes it" >&2; exit 2; }
"${PYTHON:-python3}" "$here/experts_ours.py" "$work"
for family in qwen3_moe deepseek_v3; do
  TORCHDYNAMO_DISABLE=1 "$work/env/bin/python" "$here/experts_theirs.py" "$work" $family 2>/dev/null | grep '^{"family"'
done
