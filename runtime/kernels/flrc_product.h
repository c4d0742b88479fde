/* A product of quantized activations and one plane of integers: y[t][row] = sum over inputs of x[t][input] * w[row][input].
 *
 * One result everywhere: sums of integers are exact, and per row and token the blocks' sums are added in their order with
 * one fused multiply-add each. So the bytes of y are the same on every instruction set, for any cut of rows between threads
 * and any number of tokens at a time. product_portable.c is the specification.
 *
 * Activations: int8 in blocks of 32 inputs, each with a float scale (its largest magnitude / 127) and the
 * sum of its integers.
 *
 * Weights: unsigned integers u of `width` bits (2, 3, 4, 5, 6 or 8), which stand for (u - 2^(width-1)) * scale(row, block).
 * They lie in groups of 16 rows, a group in strips of 4 blocks of 32 inputs. A strip is a line of 64 scale bytes (16 rows of
 * the first block, then of the second, ...; bytes of blocks that are not there are 0), then a tile a block.
 * A tile is `width` lines of 64 bytes, in bit planes, the highest bits first: 8 = 4 + 4, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1.
 * In every line, byte 4 * row + k belongs to a row and to the inputs k, 4 + k, 8 + k, ... (k = 0 .. 3):
 *   plane of 4 bits, line j of 4: low nibble input 8j + k, high nibble 8j + 4 + k
 *   plane of 2 bits, line j of 2: bits 2f, 2f + 1 (f = 0 .. 3) input 16j + 4f + k
 *   plane of 1 bit, one line:     bit f (f = 0 .. 7) input 4f + k
 * A plane may be of floats instead (width 32, little-endian): the same groups of 16 rows, then a line of 64 bytes an input,
 * inputs filled up to a multiple of 32 as well, and no scales. It multiplies the float activations themselves, inputs in
 * their order, with one fused multiply-add each.
 *
 * A scale byte is sign, 4 bits e and 3 bits m: 0 is zero, else e is 1 .. 15 and it is +-(1 + m/8) * 2^(e - 7), times the
 * plane's own float. (No byte has e = 0 but zero itself, so no arithmetic meets a subnormal number.)
 */
#ifndef FLRC_PRODUCT_H
#define FLRC_PRODUCT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "flrc_attention.h"

#define FLRC_BLOCK 32 /* inputs that share a scale */
#define FLRC_ROWS 16  /* rows of a group */
#define FLRC_STRIP 4  /* blocks whose scales share a line */
#define FLRC_LINE 64  /* bytes */
#define FLRC_FLOAT 32 /* the width of a plane of floats */

typedef struct {
  const uint8_t *data; /* aligned to 64 bytes */
  int32_t groups;      /* of 16 rows */
  int32_t blocks;      /* of 32 inputs, as stored */
  int32_t width;       /* bits of an integer, or 32: floats */
  float scale;         /* that all scale bytes are multiples of */
} flrc_plane;

typedef struct {
  const int8_t *integers; /* [tokens][32 * stride] */
  const float *scales;    /* [tokens][stride] */
  const int32_t *sums;    /* [tokens][stride] */
  int32_t tokens;
  int32_t stride; /* blocks from one token to the next */
  int32_t blocks; /* that are read: of a plane of more, the first ones */
  const float *floats; /* [tokens][32 * stride]: what planes of floats multiply; the three above may be NULL then */
} flrc_inputs;

/* Bytes of one group of rows. */
static inline size_t flrc_group_bytes(const flrc_plane *plane) {
  if (plane->width == FLRC_FLOAT) return FLRC_LINE * FLRC_BLOCK * (size_t)plane->blocks;
  size_t strips = ((size_t)plane->blocks + FLRC_STRIP - 1) / FLRC_STRIP;
  return FLRC_LINE * (strips + (size_t)plane->blocks * (size_t)plane->width);
}

/* Writes y[token * stride + 16 * group + row] of groups first .. last - 1; adds to what is there if `add`. */
typedef void flrc_product(const flrc_plane *plane, const flrc_inputs *x, int32_t first, int32_t last, float *y,
                          ptrdiff_t stride, bool add);

flrc_product flrc_product_portable, flrc_product_avx2, flrc_product_avx_vnni, flrc_product_avx512, flrc_product_neon;
flrc_product flrc_floats_portable, flrc_floats_avx2, flrc_floats_avx512, flrc_floats_neon; /* of planes of floats */

/* What one token's activations are made of before they are multiplied; only x must be there. */
typedef struct {
  const float *x;         /* [columns] */
  const float *gate;      /* whose activation x is multiplied by */
  const float *post_norm; /* weights of a norm of that */
  const float *residual;  /* that is added */
  float *sum;             /* where what was added goes, if residual is there */
  const float *norm;      /* weights of a norm of all that */
  int32_t columns;
  float epsilon; /* of both norms, positive */
  bool gelu;     /* the activation is GELU in its tanh form, not SiLU */
} flrc_prologue;

/* Where a token's activations go, filled up with zeros to a block; `integers` (and the next two) or `floats` may be NULL. */
typedef struct {
  int8_t *integers;
  float *scales;
  int32_t *sums;
  float *floats;
} flrc_prepared;

/* Prepares blocks first .. last - 1 of a token, with norms all of them. Returns false if a value is not finite. */
typedef bool flrc_prepare(const flrc_prologue *p, int32_t first, int32_t last, const flrc_prepared *out);

flrc_prepare flrc_prepare_portable, flrc_prepare_avx2, flrc_prepare_avx512, flrc_prepare_neon;

/* An instruction set's functions. */
typedef struct {
  const char *name;
  flrc_product *product, *floats;
  flrc_prepare *prepare;
  const flrc_attention_isa *attention;
} flrc_isa;

/* The best of this machine, or the one that FLRC_EDGE_ISA names (portable, avx2, avx_vnni, avx512, neon); NULL if that is
 * not to be had here. */
const flrc_isa *flrc_best_isa(void);

#endif
