#!/usr/bin/env bash
# onnxruntime-genai's own builder beside our export, int4 in blocks of 32, an 8-bit and an int4 head:  build.sh CHECKPOINT WORK
# Needs PYTHON (has r1q with onnx and genai, and transformers).
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: build.sh CHECKPOINT WORK" >&2; exit 2; }
model=$(realpath "$1")
mkdir -p "$2"
cd "$2"
builder() { HF_HUB_OFFLINE=1 "$PYTHON" -m onnxruntime_genai.models.builder -i "$model" -o "$1" -p int4 -e cpu --extra_options hf_token=false "${@:2}"; }
# algo_config=rtn: with the default algorithm the builder writes a graph of a tied model with an 8-bit head that does not load.
[ -e theirs-head8 ] || builder theirs-head8 int4_algo_config=rtn matmul_mixed_precision=last_matmul:int8
[ -e theirs-head4 ] || builder theirs-head4
for head in 8 4; do
  [ -e ours-head$head ] || "$PYTHON" -m r1q quantize "$model" --bits 4 --group-size 32 --head-bits $head --to onnx,gguf -o ours-head$head -q
done
