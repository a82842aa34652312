#include "rows_isa.h"

#ifdef MDPGRPO_X86
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#define WIDTH 8
#include "rows.inl"

namespace mdpgrpo {
const RowKernels rows_avx2 = MDPGRPO_ROWS("avx2");
}  // namespace mdpgrpo
#endif
