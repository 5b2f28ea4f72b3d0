// Runs a package of AOTInductor without Python: aoti_main LIBRARY PACKAGE X T B I Y [LENGTHS]
// X holds T x B x I numbers of float32, LENGTHS, for a package that takes them, B of int64, and Y
// gets the float32 numbers of the model's first output. LIBRARY is rnnfast's _C.so, whose operators
// the package calls; loading it registers them.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read(const std::string& file, const std::vector<int64_t>& sizes, at::ScalarType dtype) {
  at::Tensor tensor = at::empty(sizes, dtype);
  const auto bytes = static_cast<std::streamsize>(tensor.nbytes());
  if (!std::ifstream(file, std::ios::binary).read(static_cast<char*>(tensor.data_ptr()), bytes))
    throw std::runtime_error("aoti_main: " + file + " is too short");
  return tensor;
}

void run(const std::vector<std::string>& names) {
  if (dlopen(names[1].c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
    throw std::runtime_error(dlerror());
  const int64_t steps = std::stol(names[4]), batch = std::stol(names[5]);
  std::vector<at::Tensor> inputs{read(names[3], {steps, batch, std::stol(names[6])}, at::kFloat)};
  if (names.size() > 8) inputs.push_back(read(names[8], {batch}, at::kLong));
  torch::inductor::AOTIModelPackageLoader model(names[2]);
  const at::Tensor y = model.run(inputs)[0].contiguous();
  std::ofstream(names[7], std::ios::binary)
      .write(static_cast<const char*>(y.const_data_ptr()),
             static_cast<std::streamsize>(y.nbytes()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8 && argc != 9) {
    std::cerr << "usage: aoti_main LIBRARY PACKAGE X T B I Y [LENGTHS]\n";
    return 2;
  }
  try {
    run({argv, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
