/* What a kernel of flrc.Linear knows after its creation. */
#ifndef FLRC_LINEAR_H
#define FLRC_LINEAR_H

#include "operator.h"

#define FLRC_MOST_OUTPUTS 64

enum { IN_X, IN_RESIDUAL, IN_GATE, IN_POST_NORM, IN_NORM, IN_BIAS, IN_START, IN_TILES }; /* the operator's inputs */

typedef struct {
  flrc_plane plane;     /* of the matrix itself, or V */
  flrc_plane second;    /* U; without data for a plane of the matrix */
  const uint8_t *order; /* of a pivoted pair: which output V x and U V x are; else NULL */
  int32_t offset;       /* of a pivoted pair: of its U V x among those of all */
  int32_t projection;
  int32_t ranks; /* that are read */
  int32_t place; /* of its ranks among those of all parts */
  bool first;    /* of its projection */
  bool alone;    /* the only part of its projection */
} flrc_part;

/* Rows of a product, or of the planes of one projection, that a thread computes at a time. */
typedef struct {
  int32_t part;     /* the first of those that are computed together */
  int32_t from, to; /* groups of rows */
} flrc_piece;

typedef struct {
  const OrtApi *api;
  const flrc_isa *isa;
  int32_t columns, blocks, projections, count;
  int32_t ranks, apart;       /* of all parts: ranks; rows of U of pivoted pairs, filled up */
  bool residual, gate, start; /* whether there are such inputs */
  bool integers, floats; /* whether there are planes that multiply x's integers, or x itself */
  bool inner_integers;   /* and a U that multiplies those of V x */
  const float *post_norm, *norm;
  bool gelu;
  float epsilon;
  int64_t *rows;
  float *bias; /* rows of a projection filled up to groups */
  flrc_part *parts;
  flrc_piece *pieces[2]; /* of first products, of second ones */
  int32_t made[2];
} flrc_linear_kernel;

static inline int32_t flrc_groups(int64_t rows) { return (int32_t)((rows + FLRC_ROWS - 1) / FLRC_ROWS); }
static inline int32_t flrc_blocks(int64_t inputs) { return (int32_t)((inputs + FLRC_BLOCK - 1) / FLRC_BLOCK); }

/* Where the pair's V x or U V x of a row belongs. */
static inline int32_t flrc_order_at(const uint8_t *order, int64_t row) {
  const uint8_t *b = order + 4 * row;
  return (int32_t)((uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
}

OrtStatus *flrc_linear_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);
OrtStatus *flrc_linear_compute(void *kernel, OrtKernelContext *context);
void flrc_linear_destroy(void *kernel);

#endif
