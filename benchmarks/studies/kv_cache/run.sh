#!/usr/bin/env bash
# run.sh CHECKPOINT TEXT WORK: quantize once, export the three files, measure; JSON lines on stdout
set -euo pipefail
checkpoint=$1 text=$2 work=$3 here=$(dirname "$0")
: "${PYTHON:=python}"
[ -d "$work/int4/onnx" ] || "$PYTHON" -m r1q quantize "$checkpoint" --bits 4 --group-size 32 --method rtn --to gguf,onnx -o "$work/int4" >&2
[ -d "$work/int8-cache/onnx" ] || "$PYTHON" -m r1q export "$work/int4" --to onnx --kv int8 -o "$work/int8-cache" >&2
gguf=$(ls "$work"/int4/*.gguf)
subjects=("onnxruntime:$work/int4/onnx" "onnxruntime:$work/int8-cache/onnx" "llama-cpp:$gguf" "llama-cpp:$gguf:q8_0")
"$PYTHON" "$here/divergence.py" --text "$text" "${subjects[@]}"
"$PYTHON" "$here/speed.py" "${subjects[@]}"
