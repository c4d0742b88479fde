/* Which instruction set computes: the best of this machine, or the one that FLRC_EDGE_ISA names. */
#include <stdlib.h>
#include <string.h>

#include "flrc_product.h"

typedef struct {
  const char *name;
  flrc_product *product;
  bool (*here)(void);
} isa;

static bool always(void) { return true; }

#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>

static bool neon(void) { return getauxval(16 /* AT_HWCAP */) >> 20 & 1; /* HWCAP_ASIMDDP */ }
#else
static bool neon(void) { return true; } /* every 64-bit ARM that Apple and Windows run on has it */
#endif
#endif

#if defined(__x86_64__)
#include <cpuid.h>

static bool avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static bool avx_vnni(void) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static bool avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}
#endif

static const isa ALL[] = {
#if defined(__x86_64__)
    {"avx512", flrc_product_avx512, avx512},
    {"avx_vnni", flrc_product_avx_vnni, avx_vnni},
    {"avx2", flrc_product_avx2, avx2},
#endif
#if defined(__aarch64__)
    {"neon", flrc_product_neon, neon},
#endif
    {"portable", flrc_product_portable, always},
};

flrc_product *flrc_best_product(const char **name) {
  const char *wanted = getenv("FLRC_EDGE_ISA");
  for (size_t i = 0; i < sizeof ALL / sizeof *ALL; i++) {
    if (wanted && *wanted && strcmp(wanted, ALL[i].name) != 0) continue;
    if (!ALL[i].here()) continue;
    if (name) *name = ALL[i].name;
    return ALL[i].product;
  }
  return NULL;
}
