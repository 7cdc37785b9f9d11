// Python module _C: what the dispatcher cannot say. No torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of epsa_fused and this machine.";

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = EPSA_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cuda"] = static_cast<bool>(EPSA_WITH_CUDA);
#ifdef _OPENMP
        info["openmp"] = _OPENMP;
#else
        info["openmp"] = 0;
#endif
        std::vector<std::string> isas;
        for (auto isa : epsa::cpu::built_isas()) {
          isas.push_back(epsa::cpu::name(isa));
        }
        info["cpu_isas"] = isas;
        return info;
      },
      "The torch version and the compiler it was built with, whether it holds "
      "CUDA kernels, the OpenMP version (0: one thread only), and the "
      "instruction sets that the CPU kernels were compiled for.");

  m.def(
      "cpu_isa", [] { return epsa::cpu::name(epsa::cpu::isa_in_use()); },
      "The instruction set that the CPU kernels use on this machine; "
      "EPSA_CPU_ISA overrides the choice.");
}
