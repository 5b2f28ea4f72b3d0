// The engine as the host compiles it: cuda_runtime.h is the one beside this file.
#include "cuda/engine.cu"
