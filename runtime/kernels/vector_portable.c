/* What is computed in floats, in plain C: the specification. */
#define FLRC_PORTABLE
#define FLRC_NAME(name) name##_portable
#include "vec.h"

#include "floats.h"
#include "prepare.h"
