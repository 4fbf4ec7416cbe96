#include "tile_math.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

// The same source is compiled for several instruction sets, and the processor chooses at run time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CONTRASTIVE_KERNELS_X86_LEVELS
#endif

namespace contrastive_kernels {

namespace baseline {
constexpr const char* kInstructionSet = "baseline";
#include "tile_math.inc"
}  // namespace baseline

#ifdef CONTRASTIVE_KERNELS_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace x86_64_v3 {
constexpr const char* kInstructionSet = "x86-64-v3";
#include "tile_math.inc"
}  // namespace x86_64_v3
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace x86_64_v4 {
constexpr const char* kInstructionSet = "x86-64-v4";
#include "tile_math.inc"
}  // namespace x86_64_v4
#pragma GCC pop_options
#endif

template <typename T>
const TileMath<T>& tile_math() {
#ifdef CONTRASTIVE_KERNELS_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return x86_64_v4::math<T>;
  if (__builtin_cpu_supports("x86-64-v3")) return x86_64_v3::math<T>;
#endif
  return baseline::math<T>;
}

template const TileMath<float>& tile_math<float>();
template const TileMath<double>& tile_math<double>();

}  // namespace contrastive_kernels
