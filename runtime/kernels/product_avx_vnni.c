/* AVX-VNNI, which processors without AVX-512 have. */
#define FLRC_VNNI
#include "product_256.h"

FLRC_PRODUCT(flrc_product_avx_vnni)
