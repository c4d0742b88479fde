/* What is computed in floats, in plain C: the specification. */
#define FLRC_PORTABLE
#define FLRC_NAME(name) name##_portable
#define FLRC_ROWS_AT_ONCE 1
#define FLRC_BLOCKS_AT_ONCE 1
#define FLRC_VECTORS_AT_ONCE 1
#define FLRC_OVER_ROWS(some) some(1)
#include "vec.h"

#include "attend.h"
#include "floats.h"
#include "prepare.h"
