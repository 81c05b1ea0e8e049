#!/usr/bin/env bash
# gptqmodel to GPTQ int4 on 32 windows of 512 tokens, in an environment of its own; one JSON line a run: time, memory, divergence.
#   run.sh CHECKPOINT CALIBRATION WORK [GROUP_SIZE …]     default 64 128
# With TOOLS (llama_cpp_kld/build.sh's folder) and REFERENCE (logits) the folder is dequantized by r1q's own reader, written as an f16
# GGUF file and scored, by PYTHON (default python3), which has r1q.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: run.sh CHECKPOINT CALIBRATION WORK [GROUP_SIZE …]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3} checkpoint=$(realpath "$1") calibration=$(realpath "$2") work=$3
shift 3
[ $# -gt 0 ] || set -- 64 128
mkdir -p "$work"
work=$(realpath "$work")
# Its default of half the cores is one worker on two cores, and then it refuses to start: it wants two.
[ "$(nproc)" -gt 2 ] || export GPTQMODEL_CPU_WORKERS=2
export HF_HUB_OFFLINE=1
if [ ! -e "$work/ready" ]; then
  python3 -m venv "$work/env"
  # gptqmodel 7.7.0 names torch>=2.14.1; it runs with 2.13.0, so its own requirements are given here without that one.
  "$work/env/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt"
  "$work/env/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation gptqmodel==7.7.0
  # The first run of all compiles its packing kernel: not part of any time below.
  (cd "$work" && env/bin/python "$here/quantize.py" "$checkpoint" "$calibration" "$work/first" 64 1 64 >first.log 2>&1)
  touch "$work/ready"
fi
for group in "$@"; do
  out=$work/g$group
  if [ ! -e "$out/time.json" ]; then
    rm -rf "$out"
    mkdir "$out"
    # It writes a folder of logs where it is started.
    (cd "$out" && /usr/bin/time -o "$work/time.json" -f '{"wall_s": %e, "user_s": %U, "system_s": %S, "peak_rss_kib": %M}' \
      "$work/env/bin/python" "$here/quantize.py" "$checkpoint" "$calibration" "$out/gptq" "$group" >"$out/log" 2>&1) \
      || { tail -n 20 "$out/log" >&2; exit 1; }
    mv "$work/time.json" "$out/time.json"
  fi
  line="{\"peer\": \"gptqmodel\", \"bits\": 4, \"group_size\": $group, \"run\": $(cat "$out/time.json")"
  if [ -n "${TOOLS:-}" ]; then
    [ -e "$out/float/model.safetensors" ] || "$python" "$here/dequantize.py" "$checkpoint" "$out/gptq" "$out/float" >&2
    "$python" -m r1q quantize "$out/float" --scheme f16 -o "$out/f16" -q >&2 # a finished one says so and does nothing
    line+=", \"score\": $("$python" "$here/../llama_cpp_kld/score.py" "$TOOLS" "$REFERENCE" "$out"/f16/*.gguf)"
  fi
  echo "$line}" | tee -a "$work/results.jsonl"
done
