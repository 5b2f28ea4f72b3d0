// Calls of 16 bits of cells that have kernels of full width only.
#pragma once

#include <type_traits>

#include "../core/cell_info.h"
#include "dispatch.h"

namespace rnnfast {

template <class scalar_t>
constexpr bool kIsHalf = std::is_same_v<scalar_t, BFloat16> || std::is_same_v<scalar_t, Float16>;

template <class scalar_t>
bool is_widened(int cell) {
  return kIsHalf<scalar_t> && !cell_info(cell).half_kernels;
}

template <class half_t>
void run_forward_widened(Isa isa, int cell, const ForwardArgs<half_t>& args,
                         const Threads& threads);

// The panels are float32's.
template <class half_t>
void pack_weights_widened(Isa isa, int cell, const LayerArgs<half_t>& args, char* packed);

}  // namespace rnnfast
