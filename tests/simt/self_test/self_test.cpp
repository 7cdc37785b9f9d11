// Small kernels for the emulator itself: healthy ones, and ones with a planted bug.
// `self_test NAME...` runs these cases and prints for each "ok", or what was wrong.
#include "self_test/self_test.h"

#include <cstdio>

int main(int argc, char** argv) {
  epsa::cuda::Cases cases = epsa::cuda::block_cases();
  cases.merge(epsa::cuda::grid_cases());
  cases.merge(epsa::cuda::schedule_cases());
  cases.merge(epsa::cuda::misuse_cases());
  bool right = true;
  for (int i = 1; i < argc; ++i) {
    const std::string report = cases.at(argv[i])();
    std::printf("%s: %s\n", argv[i], report.empty() ? "ok" : report.c_str());
    std::fflush(stdout);
    right = right && report.empty();
  }
  return right ? 0 : 1;
}
