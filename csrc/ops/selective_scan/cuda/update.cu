// Launches of update.cuh and update_dense.cuh.
#include "ops/selective_scan/cuda/update.h"

#include <type_traits>

#include "core/cuda/dispatch.h"
#include "core/cuda/launch.h"
#include "ops/selective_scan/cuda/update.cuh"
#include "ops/selective_scan/cuda/update_dense.cuh"

namespace fastlm::selective_scan::cuda {
namespace {

constexpr int64_t kInt = 0x7fffffff, kMostBlocks = 65535;

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Whether any four neighbouring elements from a multiple of four on are one aligned piece of memory.
bool fours(const void* data, DType dtype, int64_t unit, int64_t stride, int64_t other_stride) {
  return unit == 1 && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * size_of(dtype)) == 0 && stride % 4 == 0 &&
         other_stride % 4 == 0;
}

bool wide_states(const UpdateParams& p) {
  return fours(p.state_data, p.state_dtype, p.state_state_stride, p.state_dim_stride, p.state_batch_stride);
}

template <class T>
cudaError_t launch_any(const UpdateCall& call, cudaStream_t stream) {
  const auto start = [&]<int kLanes>() {
    const dim3 grid(fastlm::cuda::limited(ceil_div(call.p.dim, kUpdateThreads / kLanes), kInt),
                    fastlm::cuda::limited(ceil_div(call.p.batch, kUpdateRows), kMostBlocks));
    return fastlm::cuda::launch<update_kernel<T, kLanes>>(grid, kUpdateThreads, 0, stream, call);
  };
  return call.p.state <= 64 ? start.template operator()<4>() : start.template operator()<32>();
}

template <class T, class S>
cudaError_t launch_dense(const DenseCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned int>(ceil_div(call.dim, kDenseChannels)),
                  static_cast<unsigned int>(ceil_div(call.batch, kDenseRows)));
  return fastlm::cuda::launch<update_dense<T, S>>(grid, kUpdateThreads, 0, stream, call);
}

}  // namespace

bool fill_dense(DenseCall& call, const UpdateParams& p, int64_t num_slots, DType dtype) {
  const int64_t size = size_of(dtype);
  const auto contiguous = [](const Activation& x) { return x.data == nullptr || x.dim_stride == 1; };
  const auto projected = [&](const Projection& m) {
    return fours(m.data, dtype, m.state_stride, m.batch_stride, m.group_stride);
  };
  if (p.state != 16 || dtype == DType::kFloat64 || (p.state_dtype != DType::kFloat32 && p.state_dtype != dtype)) return false;
  if (p.A.dtype != DType::kFloat32 || !fours(p.A.data, p.A.dtype, p.A.state_stride, p.A.dim_stride, 0)) return false;
  if (!wide_states(p) || !projected(p.B) || !projected(p.C)) return false;
  if (!contiguous(p.x) || !contiguous(p.dt) || !contiguous(p.z) || !contiguous(p.out)) return false;
  if (num_slots == 0) return false;  // nothing is computed from the pointer of an empty tensor
  if (p.batch > kMostBlocks * kDenseRows || p.dim > kInt - kDenseChannels || num_slots > kInt) return false;

  bool fit = true;
  const auto bytes = [&](int64_t stride, int64_t element) {
    fit = fit && stride >= 0 && stride <= kInt / element;
    return static_cast<uint32_t>(fit ? stride * element : 0);
  };
  const auto matrix = [&](const Activation& x) { return DenseMatrix{static_cast<char*>(x.data), bytes(x.batch_stride, size)}; };
  const auto projection = [&](const Projection& m) {
    const auto channels = static_cast<int32_t>(m.groups == 1 ? 0 : p.dim / m.groups);
    return DenseProjection{static_cast<const char*>(m.data), bytes(m.batch_stride, size), bytes(m.group_stride, size), channels};
  };
  call.state = static_cast<char*>(p.state_data);
  call.slot_stride = bytes(p.state_batch_stride, size_of(p.state_dtype));
  call.channel_stride = bytes(p.state_dim_stride, size_of(p.state_dtype));
  call.batch = static_cast<int32_t>(p.batch);
  call.dim = static_cast<int32_t>(p.dim);
  call.num_slots = static_cast<int32_t>(num_slots);
  call.dt_softplus = p.dt_softplus;
  call.slots = p.state_batch_indices;
  call.x = matrix(p.x);
  call.dt = matrix(p.dt);
  call.z = matrix(p.z);
  call.out = matrix(p.out);
  call.A = {static_cast<char*>(const_cast<void*>(p.A.data)), bytes(p.A.dim_stride, 4)};
  call.B = projection(p.B);
  call.C = projection(p.C);
  call.D = p.D;
  call.dt_bias = p.dt_bias;
  return fit;
}

cudaError_t launch_update(const UpdateParams& p, int64_t num_slots, DType dtype, cudaStream_t stream) {
  if (p.batch == 0 || p.dim == 0) return cudaSuccess;
  DenseCall dense{};
  const bool is_dense = fill_dense(dense, p, num_slots, dtype);
  return fastlm::cuda::visit_dtype(dtype, [&]<class T>() -> cudaError_t {
    if constexpr (!std::is_same_v<T, double>) {
      if (is_dense) {
        return p.state_dtype == DType::kFloat32 ? launch_dense<T, float>(dense, stream) : launch_dense<T, T>(dense, stream);
      }
    }
    return launch_any<T>({p, num_slots, wide_states(p)}, stream);
  });
}

}  // namespace fastlm::selective_scan::cuda
