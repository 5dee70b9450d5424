// The Python module `fastlm._C`: facts about the build, the CPU level and the measured limits of the CPU and of the
// GPU. It never touches a tensor.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"
#include "ceilings/measure.h"
#ifdef FASTLM_CUDA_CEILINGS
#include "ceilings/cuda.h"
#endif
#include "core/cpu_capability.h"

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list parts;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = text.find(',', begin);
    parts.append(text.substr(begin, end == std::string::npos ? std::string::npos : end - begin));
    if (end == std::string::npos) break;
    begin = end + 1;
  }
  return parts;
}

py::object text_or_none(const char* text) {
  if (text == nullptr || *text == '\0') return py::none();
  return py::str(text);
}

py::dict build_info() {
  namespace b = fastlm::build;
  py::dict cutlass;
  cutlass["version"] = text_or_none(b::kCutlass);
  cutlass["why_not"] = text_or_none(b::kCutlassWhyNot);
  py::dict cuda;
  cuda["built"] = b::kCuda;
  cuda["emulated"] = b::kCudaEmulated;
  cuda["architectures"] = split(b::kCudaArchitectures);
  cuda["why_not"] = text_or_none(b::kCudaWhyNot);
  py::dict info;
  info["version"] = b::kVersion;
  info["torch"] = b::kTorch;
  info["torch_target"] = b::kTorchTarget;
  info["cuda"] = cuda;
  info["cutlass"] = cutlass;
  info["cpu_levels"] = split(b::kCpuLevels);
  info["compiler"] = b::kCompiler;
  info["build_type"] = b::kBuildType;
  info["flags"] = b::kFlags;
  info["sanitizers"] = text_or_none(b::kSanitizers);
  return info;
}

py::dict measure_ceiling(const std::string& name, double seconds, int threads) {
  fastlm::ceilings::Rate rate{};
  {
    py::gil_scoped_release released;
    rate = fastlm::ceilings::measure(name, seconds, threads);
  }
  py::dict answer;
  answer["per_cpu_second"] = rate.per_cpu_second;
  answer["per_wall_second"] = rate.per_wall_second;
  return answer;
}

py::list cuda_ceiling_names() {
  py::list found;
#ifdef FASTLM_CUDA_CEILINGS
  for (const std::string& name : fastlm::ceilings::cuda_names()) found.append(name);
#endif
  return found;
}

py::dict measure_cuda_ceiling(const std::string& name, double seconds) {
  py::dict answer;
#ifdef FASTLM_CUDA_CEILINGS
  fastlm::ceilings::CudaRate rate{};
  {
    py::gil_scoped_release released;
    rate = fastlm::ceilings::measure_cuda(name, seconds);
  }
  answer["best"] = rate.best;
  answer["middle"] = rate.middle;
  answer["tries"] = rate.tries;
  answer["seconds"] = rate.seconds;
  return answer;
#else
  throw std::invalid_argument("measure_cuda_ceiling: built without CUDA, so there is no '" + name + "' for " +
                              std::to_string(seconds) + " s");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled fastlm libraries.";
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return std::string(fastlm::cpu_level_name(fastlm::cpu_level())); });
  m.def("cpu_capability_problem", [] { return text_or_none(fastlm::cpu_capability_problem()); });
  m.def("set_cpu_capability", [](const std::string& name) {
    if (const char* why = fastlm::set_cpu_level(name.c_str())) throw std::invalid_argument(why);
  });
  m.def("supported_cpu_capabilities", [] {
    py::list names;
    for (int i = 0; i < fastlm::kNumCpuLevels; ++i) {
      const auto level = static_cast<fastlm::CpuLevel>(i);
      if (fastlm::cpu_level_built(level) && fastlm::cpu_level_supported(level)) names.append(fastlm::cpu_level_name(level));
    }
    return names;
  });
  m.def("ceiling_names", [] {
    py::list names;
    for (const std::string& name : fastlm::ceilings::names()) names.append(name);
    return names;
  });
  m.def("measure_ceiling", &measure_ceiling, py::arg("name"), py::arg("seconds") = 0.1, py::arg("threads") = 1);
  m.def("cuda_ceiling_names", &cuda_ceiling_names);
  m.def("measure_cuda_ceiling", &measure_cuda_ceiling, py::arg("name"), py::arg("seconds") = 0.1);
}
