// moe_dispatch on CPU: the order of picks, products of groups of rows with one matrix each, and registration. The experts stand
// in experts.cpp. Work is split by output, so no result depends on the number of threads.
#include "ops/moe_dispatch/call.h"

namespace fastlm::moe_dispatch {

Tile::Tile(ScalarType dtype) {
  const auto& kernels = FASTLM_CPU_KERNELS(moe_dispatch_forward);
  const int k = kernel_index(dtype);
  columns = kernels.columns[k];
  elements = kernels.elements[k];
  bytes = kernels.operand_bytes[k];
  element_bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

Weights weights_of(const Tensor& t, const OptionalTensor& bias) {
  Weights w{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.size(1), t.size(2), nullptr, DType::kFloat32, 0, 0};
  if (bias.has_value()) {
    w.bias = bias->data_ptr();
    w.bias_dtype = param_dtype(*bias);
    w.bias_expert_stride = bias->stride(0);
    w.bias_stride = bias->stride(1);
  }
  return w;
}

Weights transposed(Weights w) {
  std::swap(w.row_stride, w.depth_stride);
  std::swap(w.rows, w.depth);
  w.bias = nullptr;
  return w;
}

Tensor unit_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t); }

Source source_of(const Tensor& rows, const std::vector<int64_t>* index, int64_t first) {
  const int64_t element = rows.scalar_type() == ScalarType::Double ? 8 : rows.scalar_type() == ScalarType::Float ? 4 : 2;
  const char* data = static_cast<const char*>(rows.data_ptr()) + first * rows.stride(0) * element;
  return {data, rows.stride(0), index == nullptr ? nullptr : index->data(), rows.size(1)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> plan(Tensor topk_ids, int64_t num_experts) {
  constexpr const char* op = "moe_plan";
  check_ids(op, topk_ids, num_experts);
  const std::vector<int32_t> ids = id_values(op, topk_ids, num_experts);
  const auto slots = static_cast<int64_t>(ids.size());
  const Tensor offsets = empty({num_experts + 1}, ScalarType::Int, topk_ids);
  const Tensor perm = empty({slots}, ScalarType::Int, topk_ids);
  const Tensor inv = empty({slots}, ScalarType::Int, topk_ids);
  plan_slots(ids.data(), slots, num_experts, mutable_data<int32_t>(offsets), mutable_data<int32_t>(perm),
             mutable_data<int32_t>(inv));
  return {offsets, perm, inv};
}

// Every group of a grouped product. `small`: of how many rows at most it is multiplied row by row.
Wave groups_of(const std::vector<int64_t>& offsets, const Tile& tile, int64_t small, bool keep_empty) {
  Wave wave;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    if (keep_empty || offsets[e + 1] > offsets[e]) {
      wave.add(static_cast<int64_t>(e), offsets[e], offsets[e + 1], tile.columns, small);
    }
  }
  return wave;
}

// Rows that belong to no group are 0.
Tensor output(int64_t rows, int64_t columns, int64_t used, ScalarType dtype, const Tensor& like) {
  return used == rows ? empty({rows, columns}, dtype, like) : zeros({rows, columns}, dtype, like);
}

Tensor grouped_gemm(Tensor a, Tensor b, Tensor offsets, bool trans_b) {
  constexpr const char* op = "grouped_gemm";
  check_grouped_gemm(op, a, b, offsets, trans_b);
  const std::vector<int64_t> ends = offset_values(op, offsets, a.size(0));
  const ScalarType dtype = a.scalar_type();
  const Tile tile(dtype);
  Product p{};
  p.weight = trans_b ? weights_of(b, {}) : transposed(weights_of(b, {}));
  const Tensor out = output(a.size(0), p.weight.rows, ends.back(), dtype, a);
  if (ends.back() == 0 || p.weight.rows == 0) return out;

  const Tensor rows = unit_rows(a);
  const Wave wave = groups_of(ends, tile, p.weight.depth_stride == 1 ? kSmallGroup : 0, false);
  Memory memory(a);
  Pack pack{};
  pack.groups = p.groups = wave.view(torch::stable::get_num_threads());
  pack.from = p.x = source_of(rows, nullptr);
  pack.columns = memory.bytes(tile.columns_bytes(wave.packed_rows, p.weight.depth));
  p.x_packed = pack.columns;
  p.out = out.data_ptr();
  p.out_row_stride = p.weight.rows;
  const auto& kernels = FASTLM_CPU_KERNELS(moe_dispatch_forward);
  const int k = kernel_index(dtype);
  run_pieces(op, wave.blocks(), [&](int64_t piece) { kernels.pack[k](pack, piece); });
  run_pieces(op, wave.count() * ceil_div(p.weight.rows, kBlock), [&](int64_t piece) { kernels.product[k](p, piece); });
  return out;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(Tensor dout, Tensor a, Tensor b, Tensor offsets, bool trans_b, bool need_da,
                                                 bool need_db) {
  constexpr const char* op = "grouped_gemm_backward";
  check_grouped_gemm(op, a, b, offsets, trans_b);
  check_grouped_gemm_backward(dout, a, b, trans_b);
  const std::vector<int64_t> ends = offset_values(op, offsets, a.size(0));
  const ScalarType dtype = a.scalar_type();
  const Tile tile(dtype);
  const Tensor da = need_da ? output(a.size(0), a.size(1), ends.back(), dtype, a) : no_tensor(dtype, a);
  const Tensor db = need_db ? empty({b.size(0), b.size(1), b.size(2)}, dtype, a) : no_tensor(dtype, a);
  const Tensor dout_rows = unit_rows(dout);
  const Tensor a_rows = unit_rows(a);
  const Wave wave = groups_of(ends, tile, 0, true);
  Memory memory(a);
  const auto& forward = FASTLM_CPU_KERNELS(moe_dispatch_forward);
  const auto& kernels = FASTLM_CPU_KERNELS(moe_dispatch_backward);
  const int k = kernel_index(dtype);

  Pack pack_dout{};
  pack_dout.groups = wave.view(torch::stable::get_num_threads());
  pack_dout.from = source_of(dout_rows, nullptr);
  pack_dout.packed_rows = wave.packed_rows;
  if (need_da) pack_dout.rows = memory.bytes(tile.rows_bytes(wave.packed_rows, dout.size(1)));
  if (need_db) pack_dout.depths = memory.bytes(tile.depths_bytes(wave.packed_rows, dout.size(1)));
  Pack pack_a = pack_dout;
  pack_a.from = source_of(a_rows, nullptr);
  pack_a.rows = nullptr;
  if (need_db) pack_a.depths = memory.bytes(tile.depths_bytes(wave.packed_rows, a.size(1)));
  run_pieces(op, wave.blocks() * 2, [&](int64_t piece) {
    if (piece < wave.blocks()) {
      forward.pack[k](pack_dout, piece);
    } else if (need_db) {
      forward.pack[k](pack_a, piece - wave.blocks());
    }
  });

  RowProduct rows{};
  if (need_da) {
    rows.groups = wave.view(torch::stable::get_num_threads());
    rows.weight = trans_b ? weights_of(b, {}) : transposed(weights_of(b, {}));
    rows.segments[0] = {pack_dout.rows, dout.size(1), 0};
    rows.num_segments = 1;
    rows.out = da.data_ptr();
    rows.out_row_stride = a.size(1);
  }
  Outer outer{};
  if (need_db) {
    outer.groups = wave.view(torch::stable::get_num_threads());
    outer.a = trans_b ? pack_dout.depths : pack_a.depths;
    outer.b = trans_b ? pack_a.depths : pack_dout.depths;
    outer.packed_rows = wave.packed_rows;
    outer.rows = outer.out_rows = b.size(1);
    outer.columns = b.size(2);
    outer.out = db.data_ptr();
  }
  const int64_t row_pieces = need_da && ends.back() > 0 ? wave.count() * ceil_div(a.size(1), kBlock) : 0;
  const int64_t outer_pieces = need_db ? wave.count() * ceil_div(b.size(1), kBlock) * ceil_div(b.size(2), kBlock) : 0;
  run_pieces(op, row_pieces + outer_pieces, [&](int64_t piece) {
    piece < row_pieces ? kernels.row_product[k](rows, piece) : kernels.outer[k](outer, piece - row_pieces);
  });
  return {da, db};
}

}  // namespace
}  // namespace fastlm::moe_dispatch

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("moe_plan", TORCH_BOX(&fastlm::moe_dispatch::plan));
  m.impl("grouped_gemm", TORCH_BOX(&fastlm::moe_dispatch::grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&fastlm::moe_dispatch::grouped_gemm_backward));
  m.impl("moe_experts", TORCH_BOX(&fastlm::moe_dispatch::experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&fastlm::moe_dispatch::experts_backward));
}
