/* What is computed in floats, with NEON. */
#define FLRC_NAME(name) name##_neon
#include "vec.h"

#include "floats.h"
#include "prepare.h"
