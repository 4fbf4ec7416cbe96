#include "build_info.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

#include "products.h"
#include "tile/tile_math.h"

#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "GCC " __VERSION__
#endif

namespace contrastive_kernels {

// contrastive_kernels/engine/backends/cpp.py searches the file for this text where the extension does not load.
[[gnu::used]] const char kBuiltForTorch[] = "contrastive_kernels: built for torch " TORCH_VERSION;

BuildInfo build_info() {
  return {.torch = TORCH_VERSION,
          .standard = __cplusplus,
          .compiler = COMPILER,
          .instruction_set = tile_math<float>().instruction_set,
          .bfloat16_matrix_unit = has_matrix_unit(at::kBFloat16),
          .threads = at::get_num_threads()};
}

}  // namespace contrastive_kernels
