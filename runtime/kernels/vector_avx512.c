/* What is computed in floats, with AVX-512. */
#define FLRC_NAME(name) name##_avx512
#include "vec.h"

#include "floats.h"
#include "prepare.h"
