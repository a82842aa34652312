#pragma once

#include "../torch_abi.h"

namespace mdpgrpo {

extern const char* const SAMPLE;  // its schema
void sample(StableIValue* stack, uint64_t, uint64_t);

}  // namespace mdpgrpo
