#include "schedule.h"

#include <utility>

namespace contrastive_kernels {

std::vector<Range> groups(int64_t n, int64_t count, int64_t granule) {
  const int64_t granules = (n + granule - 1) / granule;
  count = std::min(count, granules);
  std::vector<Range> result;
  for (int64_t g = 0; g < count; ++g)
    result.push_back({granules * g / count * granule, std::min(n, granules * (g + 1) / count * granule)});
  return result;
}

Schedule all_pairs(int64_t n, int64_t m, int64_t threads, int64_t granule) {
  const auto rows = groups(n, threads, granule), cols = groups(m, threads, granule);
  // A ring over the longer side: row group t meets column group t + p in round p.
  const size_t length = std::max(rows.size(), cols.size());
  Schedule schedule(rows.empty() || cols.empty() ? 0 : length);
  for (size_t p = 0; p < schedule.size(); ++p)
    for (size_t t = 0; t < length; ++t)
      if (t < rows.size() && (t + p) % length < cols.size()) schedule[p].push_back({rows[t], cols[(t + p) % length]});
  return schedule;
}

Schedule unordered_pairs(int64_t n, int64_t threads, int64_t granule) {
  auto sides = groups(n, 2 * threads, granule);
  // A diagonal block holds half as many pairs as another block; there are two rounds of them.
  Schedule schedule((sides.size() + threads - 1) / threads);
  for (size_t g = 0; g < sides.size(); ++g) schedule[g / threads].push_back({sides[g], sides[g], true});
  // A round-robin tournament (circle method): the first side stays, the others move by one place a round.
  if (sides.size() % 2) sides.push_back({n, n});
  for (size_t round = 1; round < sides.size(); ++round) {
    auto& blocks = schedule.emplace_back();
    for (size_t k = 0; k < sides.size() / 2; ++k) {
      const Range a = sides[k], b = sides[sides.size() - 1 - k];
      if (a.size() && b.size()) blocks.push_back({a, b});
    }
    std::rotate(sides.begin() + 1, sides.end() - 1, sides.end());
  }
  return schedule;
}

}  // namespace contrastive_kernels
