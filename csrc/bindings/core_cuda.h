// What the development module has of csrc/core's CUDA side.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast {

void add_cuda(pybind11::module_& m);

}  // namespace rnnfast
