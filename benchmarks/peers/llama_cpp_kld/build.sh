#!/usr/bin/env bash
# llama.cpp's own tools, compiled from the source that the llama-cpp-python package ships, in an environment of their own:
#   build.sh FOLDER   ->  FOLDER/bin/{llama-quantize,llama-imatrix,llama-perplexity}
# About eight minutes on two cores; needs a C++ compiler, cmake and ninja.
set -euo pipefail
out=${1:?usage: build.sh FOLDER}
mkdir -p "$out/src"
cd "$out"
[ -x bin/llama-perplexity ] && exit 0
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check scikit-build-core
env/bin/pip download -q --no-deps --no-binary llama-cpp-python --no-build-isolation -d src llama-cpp-python==0.3.36
tar xzf src/llama_cpp_python-*.tar.gz -C src
cmake -S src/llama_cpp_python-*/vendor/llama.cpp -B . -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF
cmake --build . --target llama-quantize llama-imatrix llama-perplexity -j"$(nproc)"
