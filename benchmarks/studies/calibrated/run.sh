#!/usr/bin/env bash
# r1q quantize by effort and preset, timed and scored:  run.sh CHECKPOINT CALIBRATION WORK "EFFORT …" "PRESET …"
# A PRESET like int4-g64 is integers in groups, scored through its GPTQ folder. Needs PYTHON (has r1q), TOOLS and REFERENCE, see README.md.
set -euo pipefail
[ $# -eq 5 ] || { echo 'usage: run.sh CHECKPOINT CALIBRATION WORK "EFFORT …" "PRESET …"' >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
checkpoint=$(realpath "$1") calibration=$(realpath "$2") work=$3
mkdir -p "$work"
for effort in $4; do
  for preset in $5; do
    out=$work/$effort-$preset
    rm -rf "$out"
    case $preset in
      int*-g*) bits=${preset#int} grid=(--bits "${bits%-g*}" --group-size "${preset#*-g}" --to gptq) ;;
      *) grid=(--scheme "$preset") ;;
    esac
    /usr/bin/time -o "$work/time.json" -f '{"wall_s": %e, "user_s": %U, "system_s": %S, "peak_rss_kib": %M}' \
      "$PYTHON" -m r1q quantize "$checkpoint" "${grid[@]}" --effort "$effort" --calibration "$calibration" --samples 32 -o "$out" -q >&2
    file=$(ls "$out"/*.gguf 2>/dev/null || true)
    if [ -z "$file" ]; then
      "$PYTHON" "$here/../../peers/gptqmodel/dequantize.py" "$checkpoint" "$out/gptq" "$out/float" >&2
      "$PYTHON" -m r1q quantize "$out/float" --scheme f16 -o "$out/f16" -q >&2
      file=$(ls "$out"/f16/*.gguf)
    fi
    score=$("$PYTHON" "$here/../../peers/llama_cpp_kld/score.py" "$TOOLS" "$REFERENCE" "$file")
    echo "{\"effort\": \"$effort\", \"preset\": \"$preset\", \"run\": $(cat "$work/time.json"), \"score\": $score}" | tee -a "$work/results.jsonl"
  done
done
