// Runs an AOTInductor package of a model with fused PSA modules, without Python:
//
//   run_package OPERATORS PACKAGE INPUT OUTPUT N C H W
//
// OPERATORS is epsa_fused's _ops.so; INPUT and OUTPUT are files of float32 values, the images
// [N, C, H, W] and the model's first result.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

namespace {

at::Tensor read(const char* path, const std::vector<int64_t>& shape) {
  at::Tensor values = at::empty(shape, at::kFloat);
  const auto bytes = static_cast<std::streamsize>(values.nbytes());
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(values.data_ptr()), bytes);
  TORCH_CHECK(
      file.gcount() == bytes && file.peek() == EOF, path, ": expected ", bytes,
      " bytes, the float32 values of ", at::IntArrayRef(shape));
  return values;
}

void write(const char* path, const at::Tensor& values) {
  const at::Tensor dense = values.to(at::kFloat).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(
      static_cast<const char*>(dense.const_data_ptr()),
      static_cast<std::streamsize>(dense.nbytes()));
  TORCH_CHECK(file.flush(), path, ": cannot be written");
}

}  // namespace

int main(int argc, char** argv) try {
  TORCH_CHECK(argc == 9, "usage: ", argv[0], " OPERATORS PACKAGE INPUT OUTPUT N C H W");
  // Loading it registers the operators; they stay for as long as the process runs.
  TORCH_CHECK(dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL), dlerror());
  std::vector<int64_t> shape;
  for (int i = 5; i < 9; ++i) {
    shape.push_back(std::atoll(argv[i]));
  }
  const c10::InferenceMode inference;
  const at::Tensor images = read(argv[3], shape);
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor out = model.run({images}).at(0);
  write(argv[4], out);
  std::cout << out.sizes() << std::endl;
  return 0;
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << std::endl;
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
