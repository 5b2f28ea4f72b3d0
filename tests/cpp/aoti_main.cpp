// Runs a package of AOTInductor without Python: aoti_main LIBRARY PACKAGE X T B I Y
// X holds T x B x I numbers of float32, and Y gets those of the model's first output. LIBRARY is
// rnnfast's _C.so, whose operators the package calls; loading it registers them.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 8) {
    std::cerr << "usage: aoti_main LIBRARY PACKAGE X T B I Y\n";
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const std::vector<int64_t> sizes{std::stol(argv[4]), std::stol(argv[5]), std::stol(argv[6])};
  at::Tensor x = at::empty(sizes);
  const auto bytes = static_cast<std::streamsize>(x.nbytes());
  if (!std::ifstream(argv[3], std::ios::binary).read(static_cast<char*>(x.data_ptr()), bytes)) {
    std::cerr << "aoti_main: " << argv[3] << " is too short\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor y = model.run({x})[0].contiguous();
  std::ofstream(argv[7], std::ios::binary)
      .write(static_cast<const char*>(y.const_data_ptr()),
             static_cast<std::streamsize>(y.nbytes()));
  return 0;
}
