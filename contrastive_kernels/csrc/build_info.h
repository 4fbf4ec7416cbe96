// How the extension was built, and what it makes of this processor.
#pragma once

#include <cstdint>

namespace contrastive_kernels {

struct BuildInfo {
  const char* torch;
  // The year and the month of the C++ standard, as 202002 for C++20.
  int64_t standard;
  const char* compiler;
  const char* instruction_set;
  bool bfloat16_matrix_unit;
  int64_t threads;
};

BuildInfo build_info();

}  // namespace contrastive_kernels
