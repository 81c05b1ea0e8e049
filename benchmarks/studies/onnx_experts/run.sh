#!/usr/bin/env bash
# run.sh WORK: random models with experts, the same codes as GGUF and as ONNX, measured in turn; JSON lines in WORK/FAMILY-BITS.jsonl
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: run.sh WORK" >&2; exit 2; }
work=$1 here=$(cd "$(dirname "$0")" && pwd)
: "${PYTHON:=python}"
mkdir -p "$work"
for family in qwen3_moe deepseek_v3; do
  [ -f "$work/$family/config.json" ] || "$PYTHON" "$here/generate.py" "$family" "$work/$family" >&2
  for bits in 4 8; do
    out=$work/$family-$bits
    [ -d "$out/onnx" ] || "$PYTHON" -m r1q quantize "$work/$family" --bits "$bits" --group-size 32 --method rtn --to gguf,onnx -o "$out" -q >&2
    "$PYTHON" -m r1q verify "$out" >&2
    "$PYTHON" -m r1q bench "$out" --depths 0,512 --windows 4 --prefill 512 --json >"$out.jsonl"
  done
done
