// Small integer helpers; internal linkage, so that no copy compiled for one CPU level serves another.
#pragma once

#include <cstdint>

namespace fastlm {

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fastlm
