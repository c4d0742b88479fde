/* What is computed in floats, with AVX2, FMA and F16C. */
#define FLRC_NAME(name) name##_avx2
#include "vec.h"

#include "floats.h"
#include "prepare.h"
