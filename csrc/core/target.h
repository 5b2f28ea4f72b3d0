// Names the namespace in which a translation unit keeps its own copy of the templates.
//
// The CPU kernels are compiled once an instruction set. If two such copies of one inline function
// had the same name, the linker could keep the AVX-512 one for everybody, so every header that
// holds code for kernels opens `namespace rnnfast::RNNFAST_TARGET { namespace {`: the names differ
// and no symbol is weak (tests/test_core.py).
#pragma once

#include <cstdint>

#ifndef RNNFAST_TARGET
#define RNNFAST_TARGET generic
#endif

#ifdef __CUDACC__
#define RNNFAST_HD __host__ __device__ __forceinline__
#define RNNFAST_OUTLINE __host__ __device__ inline
#define RNNFAST_UNROLL _Pragma("unroll")
#define RNNFAST_UNROLL_8 _Pragma("unroll 8")
#define RNNFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define RNNFAST_HD inline __attribute__((always_inline))
#define RNNFAST_OUTLINE __attribute__((noinline))
#define RNNFAST_UNROLL _Pragma("GCC unroll 16")
#define RNNFAST_UNROLL_8 _Pragma("GCC unroll 8")
#define RNNFAST_NO_UNROLL
#endif
