#!/usr/bin/env bash
# Builds the program of this folder: bench/exchanges/build.sh [OUTPUT] (default build/exchanges)
#
# Environment: NVCC (default nvcc), RNNFAST_CUDA_ARCHS (one, default 90a), NVCC_FLAGS (more flags).
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/../../build/exchanges}
arch=${RNNFAST_CUDA_ARCHS:-90a}
mkdir -p "$(dirname "$out")"
# shellcheck disable=SC2086 # flags are words
exec "${NVCC:-nvcc}" --threads 0 -std=c++20 -O3 -gencode="arch=compute_$arch,code=sm_$arch" -Werror all-warnings \
  ${NVCC_FLAGS:-} -o "$out" "$here"/*.cu
