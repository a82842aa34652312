#include "rows_isa.h"

#define ISA plain
#define WIDTH 4
#include "rows.inl"

namespace mdpgrpo {
const RowKernels rows_plain = MDPGRPO_ROWS("plain");
}  // namespace mdpgrpo
