/* What is computed in floats, with NEON. */
#define FLRC_NAME(name) name##_neon
#define FLRC_ROWS_AT_ONCE 3
#define FLRC_BLOCKS_AT_ONCE 2
#define FLRC_VECTORS_AT_ONCE 2
#define FLRC_OVER_ROWS(some) some(3) some(2) some(1)
#include "vec.h"

#include "attend.h"
#include "floats.h"
#include "prepare.h"
