/* What the instruction sets' files share: where a block's parts lie, and how a scale byte becomes a float. */
#ifndef FLRC_TILE_H
#define FLRC_TILE_H

#include <string.h>

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

/* Weights are asked for so many bytes before they are needed: about what a thread reads while a line comes from memory.
 * Without it one thread of a server's processor read 11 GB/s of 4-bit weights, with it 27. */
#define FLRC_AHEAD (8 * 1024)

/* Always inlined: gcc takes a call that only asks for memory for one that does nothing. */
static inline __attribute__((always_inline)) void flrc_ask(const uint8_t *tile, int32_t lines) {
  for (int32_t i = 0; i < lines; i++) __builtin_prefetch(tile + FLRC_AHEAD + FLRC_LINE * i);
}

/* What a block's scale bytes are multiplied by, for one token. */
static inline float flrc_factor(const flrc_plane *plane, float x_scale) { return plane->scale * FLRC_LIFT * x_scale; }

/* The integer that stands for 0. */
static inline int32_t flrc_zero(int32_t width) { return 1 << (width - 1); }

static inline uint32_t flrc_nibble(const uint8_t *plane, int32_t row, int32_t input) {
  uint8_t byte = plane[FLRC_LINE * (input / 8) + 4 * row + input % 4];
  return input / 4 % 2 ? byte >> 4 : byte & 15;
}

static inline uint32_t flrc_pair(const uint8_t *plane, int32_t row, int32_t input) {
  uint8_t byte = plane[FLRC_LINE * (input / 16) + 4 * row + input % 4];
  return byte >> (2 * (input / 4 % 4)) & 3;
}

static inline uint32_t flrc_bit(const uint8_t *plane, int32_t row, int32_t input) {
  return plane[4 * row + input % 4] >> (input / 4) & 1;
}

/* The integer of one row and input of a tile. */
static inline uint32_t flrc_integer(const uint8_t *tile, int32_t width, int32_t row, int32_t input) {
  switch (width) {
  case 8:
    return flrc_nibble(tile, row, input) << 4 | flrc_nibble(tile + 4 * FLRC_LINE, row, input);
  case 6:
    return flrc_nibble(tile, row, input) << 2 | flrc_pair(tile + 4 * FLRC_LINE, row, input);
  case 5:
    return flrc_nibble(tile, row, input) << 1 | flrc_bit(tile + 4 * FLRC_LINE, row, input);
  case 4:
    return flrc_nibble(tile, row, input);
  case 3:
    return flrc_pair(tile, row, input) << 1 | flrc_bit(tile + 2 * FLRC_LINE, row, input);
  default:
    return flrc_pair(tile, row, input);
  }
}

/* A scale byte over 2^120. */
static inline float flrc_scale_of(uint8_t byte) {
  uint32_t bits = (uint32_t)(byte & 0x80) << 24 | (uint32_t)(byte & 0x7f) << 20;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#endif
