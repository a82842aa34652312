#include <cstdlib>
#include <string>

#include "../torch_abi.h"
#include "rows.h"

namespace mdpgrpo {
namespace {

const RowKernels& best() {
#ifdef MDPGRPO_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return rows_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return rows_avx2;
#endif
  return rows_plain;
}

const RowKernels& chosen() {
  const RowKernels& most = best();
  const char* const wish = std::getenv("MDPGRPO_CPU");
  if (wish == nullptr || *wish == '\0' || std::string(wish) == most.name) return most;
  if (std::string(wish) == rows_plain.name) return rows_plain;
#ifdef MDPGRPO_X86
  if (std::string(wish) == rows_avx2.name && &most == &rows_avx512) return rows_avx2;
#endif
  check(false, "MDPGRPO_CPU=", wish, " is not what this CPU has; it has ", most.name,
        " and below (avx512, avx2, plain)");
  return most;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& kernels = chosen();
  return kernels;
}

}  // namespace mdpgrpo
