/* What the instruction sets' files share: where a block's parts lie, and how a scale byte becomes a float. */
#ifndef FLRC_TILE_H
#define FLRC_TILE_H

#include "flrc_product.h"

/* 2^120: a byte's exponent and mantissa, put at a float's place, are worth 2^-120 of what they stand for. */
#define FLRC_LIFT 0x1p120f

typedef struct {
  const uint8_t *scales; /* 16 bytes */
  const uint8_t *tile;
} flrc_block;

/* The block `b` of the group that begins at `group`. */
static inline flrc_block flrc_block_at(const uint8_t *group, int32_t b, int32_t width) {
  int32_t strip = b / FLRC_STRIP, within = b % FLRC_STRIP;
  const uint8_t *line = group + (size_t)FLRC_LINE * ((size_t)strip * (1 + FLRC_STRIP * (size_t)width));
  flrc_block found = {line + within * FLRC_ROWS, line + FLRC_LINE * (1 + (size_t)within * (size_t)width)};
  return found;
}

/* What a block's scale bytes are multiplied by, for one token. */
static inline float flrc_factor(const flrc_plane *plane, float x_scale) { return plane->scale * FLRC_LIFT * x_scale; }

/* The integer that stands for 0. */
static inline int32_t flrc_zero(int32_t width) { return 1 << (width - 1); }

#endif
