// What rows.inl needs, before the instruction set is chosen: what a header defines stays with that of the whole build.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

#ifdef MDPGRPO_X86
#include <immintrin.h>
#endif
