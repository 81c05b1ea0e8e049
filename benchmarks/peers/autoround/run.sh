#!/usr/bin/env bash
# AutoRound to GGUF Q4_0 on 32 windows of 512 tokens, in an environment of its own; one JSON line a run: time, memory, divergence.
#   run.sh CHECKPOINT CALIBRATION WORK [ITERATIONS …]     default 0 50 200; 0 is its optimised round-to-nearest
# With TOOLS (llama_cpp_kld/build.sh's folder) and REFERENCE (logits) the file is scored too, by PYTHON (default python3), which has r1q.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: run.sh CHECKPOINT CALIBRATION WORK [ITERATIONS …]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
checkpoint=$(realpath "$1") calibration=$(realpath "$2") work=$3
shift 3
[ $# -gt 0 ] || set -- 0 50 200
mkdir -p "$work"
work=$(realpath "$work")
if [ ! -e "$work/ready" ]; then
  python3 -m venv "$work/env"
  "$work/env/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt"
  touch "$work/ready"
fi
for iterations in "$@"; do
  out=$work/i$iterations
  if [ ! -e "$out/time.json" ]; then
    rm -rf "$out"
    mkdir "$out"
    HF_HUB_OFFLINE=1 /usr/bin/time -o "$work/time.json" \
      -f '{"wall_s": %e, "user_s": %U, "system_s": %S, "peak_rss_kib": %M}' \
      "$work/env/bin/python" "$here/quantize.py" "$checkpoint" "$calibration" "$out" "$iterations" >"$out/log" 2>&1 \
      || { tail -n 20 "$out/log" >&2; exit 1; }
    mv "$work/time.json" "$out/time.json"
  fi
  line="{\"peer\": \"auto-round\", \"iterations\": $iterations, \"run\": $(cat "$out/time.json")"
  if [ -n "${TOOLS:-}" ]; then
    file=$(find "$out" -name '*.gguf')
    line+=", \"score\": $("${PYTHON:-python3}" "$here/../llama_cpp_kld/score.py" "$TOOLS" "$REFERENCE" "$file")"
  fi
  echo "$line}" | tee -a "$work/results.jsonl"
done
