/* AVX2 with FMA. */
#include "product_256.h"

FLRC_PRODUCT(flrc_product_avx2)
