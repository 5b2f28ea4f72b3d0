// As engine.cpp, of what has two dtypes.
#include "cuda/batch_norm.cu"
