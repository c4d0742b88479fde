/* The loops over groups of rows and over tokens, FLRC_TOKENS (8 or 4), 4, 2 or 1 at a time. Included by an instruction set's
 * file behind its own `tokens(plane, x, group, t, count, width, y, stride, add)`, which computes 16 rows of `count` tokens
 * from `t` on.
 */
INLINE void groups(const flrc_plane *plane, const flrc_inputs *x, int32_t first, int32_t last, float *y, ptrdiff_t stride,
                   bool add, int width) {
  size_t size = flrc_group_bytes(plane);
  for (int32_t g = first; g < last; g++) {
    const uint8_t *group = plane->data + (size_t)g * size;
    int32_t t = 0;
    if (FLRC_TOKENS == 8)
      for (; t + 8 <= x->tokens; t += 8) tokens(plane, x, group, t, 8, width, y + FLRC_ROWS * g, stride, add);
    for (; t + 4 <= x->tokens; t += 4) tokens(plane, x, group, t, 4, width, y + FLRC_ROWS * g, stride, add);
    for (; t + 2 <= x->tokens; t += 2) tokens(plane, x, group, t, 2, width, y + FLRC_ROWS * g, stride, add);
    for (; t < x->tokens; t++) tokens(plane, x, group, t, 1, width, y + FLRC_ROWS * g, stride, add);
  }
}

/* Defines the product, compiled for every width by itself. */
#define FLRC_PRODUCT(name)                                                                                                 \
  void name(const flrc_plane *plane, const flrc_inputs *x, int32_t first, int32_t last, float *y, ptrdiff_t stride,        \
            bool add) {                                                                                                    \
    switch (plane->width) {                                                                                                \
    case 8:                                                                                                                \
      groups(plane, x, first, last, y, stride, add, 8);                                                                    \
      break;                                                                                                               \
    case 6:                                                                                                                \
      groups(plane, x, first, last, y, stride, add, 6);                                                                    \
      break;                                                                                                               \
    case 5:                                                                                                                \
      groups(plane, x, first, last, y, stride, add, 5);                                                                    \
      break;                                                                                                               \
    case 4:                                                                                                                \
      groups(plane, x, first, last, y, stride, add, 4);                                                                    \
      break;                                                                                                               \
    case 3:                                                                                                                \
      groups(plane, x, first, last, y, stride, add, 3);                                                                    \
      break;                                                                                                               \
    default:                                                                                                               \
      groups(plane, x, first, last, y, stride, add, 2);                                                                    \
    }                                                                                                                      \
  }
