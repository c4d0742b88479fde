/* What is computed in floats, with AVX-512. */
#define FLRC_NAME(name) name##_avx512
#define FLRC_ROWS_AT_ONCE 4
#define FLRC_BLOCKS_AT_ONCE 4
#define FLRC_VECTORS_AT_ONCE 4
#define FLRC_OVER_ROWS(some) some(4) some(3) some(2) some(1)
#include "vec.h"

#include "attend.h"
#include "floats.h"
#include "prepare.h"
