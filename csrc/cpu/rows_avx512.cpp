#include "rows_isa.h"

#ifdef MDPGRPO_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ISA avx512
#define WIDTH 16
#include "rows.inl"

namespace mdpgrpo {
const RowKernels rows_avx512 = MDPGRPO_ROWS("avx512");
}  // namespace mdpgrpo
#endif
