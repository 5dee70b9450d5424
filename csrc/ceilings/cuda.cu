// Measuring loops of cuda.h. Register loops: 16 chains a thread, 1024 threads a multiprocessor twice over, so that every pipe has
// work in flight whatever its latency. Memory loops: 16 bytes a thread and load, four loads in flight, grid as large as the
// buffer. Times are CUDA events around one launch of a few milliseconds.
#include "ceilings/cuda.h"

#include <algorithm>
#include <stdexcept>

#include "core/cuda/device.cuh"
#include "core/cuda/launch.h"

namespace fastlm::ceilings {
namespace {

constexpr int kChains = 16;
constexpr int kUnroll = 8;
constexpr unsigned int kThreads = 512;
constexpr int kLoads = 4;                   // 16-byte loads of a thread in flight
constexpr int kFmasPerExp = 8;              // in the mixed loop
constexpr size_t kBytes = size_t{1} << 30;  // of a buffer: 20 times the L2 of an H100
constexpr double kSecondsPerLaunch = 4e-3;
constexpr int kEmptyLaunches = 2000;

__global__ void __launch_bounds__(kThreads) fma_loop(int64_t rounds, float a, float b, float* sink) {
  float x[kChains];
#pragma unroll
  for (int c = 0; c < kChains; ++c) x[c] = static_cast<float>(threadIdx.x + c);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) x[c] = fmaf(x[c], a, b);
    }
  }
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += x[c];
  if (sum == -1.0f) *sink = sum;  // never; keeps the loop
}

// x -> 2^-x stays between 0.5 and 1; the sign is part of the instruction.
__global__ void __launch_bounds__(kThreads) exp2_loop(int64_t rounds, float, float, float* sink) {
  float x[kChains];
#pragma unroll
  for (int c = 0; c < kChains; ++c) x[c] = 0.5f + 0.001f * static_cast<float>(threadIdx.x + c);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) x[c] = cuda::exp2_approx(-x[c]);
    }
  }
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += x[c];
  if (sum == -1.0f) *sink = sum;
}

// Half of the chains are exponentials, the other half multiply-adds, kFmasPerExp of these for one of those.
__global__ void __launch_bounds__(kThreads) fma_exp2_loop(int64_t rounds, float a, float b, float* sink) {
  constexpr int kHalf = kChains / 2;
  float x[kHalf], y[kHalf];
#pragma unroll
  for (int c = 0; c < kHalf; ++c) {
    x[c] = 0.5f + 0.001f * static_cast<float>(threadIdx.x + c);
    y[c] = static_cast<float>(threadIdx.x + c);
  }
  for (int64_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int c = 0; c < kHalf; ++c) {
        x[c] = cuda::exp2_approx(-x[c]);
#pragma unroll
        for (int k = 0; k < kFmasPerExp; ++k) y[(c + k) % kHalf] = fmaf(y[(c + k) % kHalf], a, b);
      }
    }
  }
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kHalf; ++c) sum += x[c] + y[c];
  if (sum == -1.0f) *sink = sum;
}

__global__ void __launch_bounds__(kThreads) read_loop(const uint4* from, int64_t count, float* sink) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kLoads + threadIdx.x;
  uint4 x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t at = begin + static_cast<int64_t>(i) * kThreads;
    x[i] = at < count ? __ldg(from + at) : uint4{0, 0, 0, 0};
  }
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) bits ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  if (bits == 0x12345678u) *sink = 1.0f;  // hardly ever; keeps the loads
}

__global__ void __launch_bounds__(kThreads) copy_loop(uint4* to, const uint4* from, int64_t count) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kLoads + threadIdx.x;
  uint4 x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t at = begin + static_cast<int64_t>(i) * kThreads;
    if (at < count) x[i] = __ldg(from + at);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t at = begin + static_cast<int64_t>(i) * kThreads;
    if (at < count) to[at] = x[i];
  }
}

__global__ void empty_kernel(float*) {}

// Other bits in every word: memory and wires draw less power, and may go faster, on equal ones.
__global__ void __launch_bounds__(kThreads) fill_loop(uint32_t* to, int64_t count) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x ^= x >> 15;
    to[i] = x * 2246822519u;
  }
}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("measure_cuda: ") + cudaGetErrorString(status));
}

struct Buffer {
  void* data = nullptr;
  explicit Buffer(size_t bytes) {
    check(cudaMalloc(&data, bytes));
    if (const cudaError_t status = cudaMemset(data, 0, bytes); status != cudaSuccess) {
      cudaFree(data);
      check(status);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event); }
};

using RegisterKernel = void (*)(int64_t, float, float, float*);

template <RegisterKernel kKernel>
cudaError_t launch_register_loop(unsigned int blocks, int64_t rounds, float* sink) {
  return cuda::launch<kKernel>(dim3(blocks), kThreads, 0, nullptr, rounds, 0.999f, 0.001f, sink);
}

// Seconds of work() on the device.
template <class Work>
double seconds_of(const Event& begin, const Event& end, Work&& work) {
  check(cudaEventRecord(begin.event, nullptr));
  check(work());
  check(cudaEventRecord(end.event, nullptr));
  check(cudaEventSynchronize(end.event));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin.event, end.event));
  return 1e-3 * static_cast<double>(milliseconds);
}

template <class Work>
CudaRate rate_of(double amount, double seconds, Work&& work) {
  const Event begin, end;
  for (int i = 0; i < 3; ++i) seconds_of(begin, end, work);
  std::vector<double> times;
  double total = 0;
  while (total < seconds || times.size() < 5) {
    times.push_back(seconds_of(begin, end, work));
    total += times.back();
  }
  std::sort(times.begin(), times.end());
  const double middle = times[times.size() / 2];
  return {amount / times.front(), amount / middle, static_cast<int>(times.size()), middle};
}

template <RegisterKernel kKernel>
CudaRate register_rate(double per_round, double seconds) {
  int device = 0, sms = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const auto blocks = static_cast<unsigned int>(sms * 4);
  const Buffer sink(sizeof(float));
  auto* const out = static_cast<float*>(sink.data);
  int64_t rounds = 1000;
  {
    const Event begin, end;
    seconds_of(begin, end, [&] { return launch_register_loop<kKernel>(blocks, rounds, out); });
    const double once = seconds_of(begin, end, [&] { return launch_register_loop<kKernel>(blocks, rounds, out); });
    rounds = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(rounds) * kSecondsPerLaunch / std::max(once, 1e-6)));
  }
  const double amount = per_round * static_cast<double>(rounds) * blocks * kThreads;
  return rate_of(amount, seconds, [&] { return launch_register_loop<kKernel>(blocks, rounds, out); });
}

}  // namespace

std::vector<std::string> cuda_names() { return {"fma", "exp2", "fma_exp2", "read", "copy", "launch"}; }

CudaRate measure_cuda(const std::string& name, double seconds) {
  if (!(seconds > 0) || seconds > 60) {
    throw std::invalid_argument("measure_cuda: seconds must be in (0, 60], got " + std::to_string(seconds));
  }
  if (name == "fma") return register_rate<fma_loop>(2.0 * kUnroll * kChains, seconds);
  if (name == "exp2") return register_rate<exp2_loop>(1.0 * kUnroll * kChains, seconds);
  if (name == "fma_exp2") return register_rate<fma_exp2_loop>(1.0 * kUnroll * kChains / 2, seconds);
  if (name == "read" || name == "copy") {
    constexpr auto kCount = static_cast<int64_t>(kBytes / sizeof(uint4));
    const dim3 grid(static_cast<unsigned int>(kCount / (kThreads * kLoads)));
    const Buffer from(kBytes), sink(sizeof(float));
    check(cuda::launch<fill_loop>(dim3(2048), kThreads, 0, nullptr, static_cast<uint32_t*>(from.data),
                                  static_cast<int64_t>(kBytes / sizeof(uint32_t))));
    const auto* const in = static_cast<const uint4*>(from.data);
    if (name == "read") {
      auto* const out = static_cast<float*>(sink.data);
      return rate_of(static_cast<double>(kBytes), seconds,
                     [&] { return cuda::launch<read_loop>(grid, kThreads, 0, nullptr, in, kCount, out); });
    }
    const Buffer to(kBytes);
    auto* const out = static_cast<uint4*>(to.data);
    return rate_of(2.0 * static_cast<double>(kBytes), seconds,
                   [&] { return cuda::launch<copy_loop>(grid, kThreads, 0, nullptr, out, in, kCount); });
  }
  if (name == "launch") {
    const Buffer sink(sizeof(float));
    auto* const out = static_cast<float*>(sink.data);
    return rate_of(kEmptyLaunches, seconds, [&] {
      for (int i = 0; i < kEmptyLaunches; ++i) {
        if (const cudaError_t status = cuda::launch<empty_kernel>(dim3(1), 32, 0, nullptr, out); status != cudaSuccess)
          return status;
      }
      return cudaSuccess;
    });
  }
  throw std::invalid_argument("measure_cuda: name must be fma, exp2, fma_exp2, read, copy or launch, got '" + name + "'");
}

}  // namespace fastlm::ceilings
