/* Which instruction set computes: the best of this machine, or the one that FLRC_EDGE_ISA names. */
#include <stdlib.h>
#include <string.h>

#include "flrc_product.h"

typedef struct {
  flrc_isa isa;
  bool (*here)(void);
} choice;

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

/* Asked of the processor itself: __builtin_cpu_supports is a part of a compiler's library, which not every compiler has. */
enum { BASIC_C, EXTENDED_B, EXTENDED_C, EXTENDED_1_A, STATES, WORDS };

static void ask(unsigned found[WORDS]) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  memset(found, 0, WORDS * sizeof *found);
  if (!__get_cpuid(1, &a, &b, &c, &d)) return;
  found[BASIC_C] = c;
  if (c >> 27 & 1) { /* OSXSAVE: the system says which registers it keeps */
    __asm__ volatile("xgetbv" : "=a"(found[STATES]), "=d"(d) : "c"(0));
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    found[EXTENDED_B] = b;
    found[EXTENDED_C] = c;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found[EXTENDED_1_A] = a;
  }
}

static bool all(unsigned word, unsigned bits) { return (word & bits) == bits; }

static bool avx2(void) {
  unsigned found[WORDS];
  ask(found);
  /* registers of 128 and 256 bits; FMA, AVX, F16C; AVX2 */
  return all(found[STATES], 0x6) && all(found[BASIC_C], 1u << 12 | 1u << 28 | 1u << 29) && all(found[EXTENDED_B], 1u << 5);
}

static bool avx_vnni(void) {
  unsigned found[WORDS];
  ask(found);
  return avx2() && all(found[EXTENDED_1_A], 1u << 4);
}

static bool avx512(void) {
  unsigned found[WORDS];
  ask(found);
  /* registers of 512 bits and masks; AVX-512 F, DQ, BW, VL; VNNI */
  return avx2() && all(found[STATES], 0xe6) && all(found[EXTENDED_B], 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) &&
         all(found[EXTENDED_C], 1u << 11);
}
#endif

#define FUNCTIONS(name, product, vector) \
  {#name, flrc_product_##product, flrc_floats_##vector, flrc_prepare_##vector, &flrc_attention_##vector}

static const choice ALL[] = {
#if defined(__x86_64__)
    {FUNCTIONS(avx512, avx512, avx512), avx512},
    {FUNCTIONS(avx_vnni, avx_vnni, avx2), avx_vnni},
    {FUNCTIONS(avx2, avx2, avx2), avx2},
#endif
#if defined(__aarch64__)
    {FUNCTIONS(neon, neon, neon), neon},
#endif
    {FUNCTIONS(portable, portable, portable), always},
};

const flrc_isa *flrc_best_isa(void) {
  const char *wanted = getenv("FLRC_EDGE_ISA");
  for (size_t i = 0; i < sizeof ALL / sizeof *ALL; i++) {
    if (wanted && *wanted && strcmp(wanted, ALL[i].isa.name) != 0) continue;
    if (ALL[i].here()) return &ALL[i].isa;
  }
  return NULL;
}
