#pragma once

#include <cstdint>

namespace rnnfast {

// How many of the threads on offer a direction of the LSTM with recurrent batch normalisation uses.
int batch_norm_threads(int64_t batch, int64_t input_size, int64_t hidden_size, int offered);

}  // namespace rnnfast
