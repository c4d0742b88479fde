/* The operator flrc.Linear: all projections of one input, each a sum of parts.
 *
 * Inputs: x [..., columns] float, then a tile tensor (flrc_product.h) a plane. Outputs: one a projection, [..., rows] float.
 * Attributes:
 *   columns of x: inputs of every projection
 *   rows    of every projection
 *   parts   six numbers a part: its projection; the width of its plane, or of V; of U, or 0 for a plane of the matrix itself;
 *           the ranks V and U hold; those that this stage reads (a multiple of 32, the first ones); 1 if it is pivoted
 *   scales  the float of every plane, V before U
 * A pivoted pair has the rows of V themselves as outputs, and U for the others alone: V x, then U V x, are the outputs that
 * its order names. The order is a tensor behind U, bytes of as many little-endian int32 as the projection has rows; all ranks
 * are read. A projection's parts are added in their order: planes, then pairs, which are all pivoted or none.
 * Integers of x and of V x are int8; the outputs that V x is are not rounded.
 */
#include <stdlib.h>
#include <string.h>

#include "flrc_product.h"
#include "ort_api.h"

#define MOST_OUTPUTS 64
#define PIECE (64 * 1024) /* bytes of weights that a thread takes at a time, about */

typedef struct {
  flrc_plane plane;   /* of the matrix itself, or V */
  flrc_plane second;  /* U; without data for a plane of the matrix */
  const uint8_t *order; /* of a pivoted pair: which output V x and U V x are; else NULL */
  int32_t offset;     /* of a pivoted pair: of its U V x among those of all */
  int32_t projection;
  int32_t ranks;      /* that are read */
  int32_t place;      /* of its ranks among those of all parts */
  bool first;         /* of its projection */
} part;

typedef struct {
  int32_t part; /* the first of those that are computed together */
  int32_t from, to; /* groups of rows */
} piece;

typedef struct {
  const OrtApi *api;
  flrc_product *product;
  int32_t inputs, blocks, projections, count;
  int32_t ranks, apart; /* of all parts: ranks; rows of U of pivoted pairs, filled up */
  int64_t *rows;
  part *parts;
  piece *pieces[2]; /* of first products, of second ones */
  int32_t made[2];
} linear;

static int32_t filled(int64_t rows) { return (int32_t)((rows + FLRC_ROWS - 1) / FLRC_ROWS); }

static void destroy(void *kernel) {
  linear *k = kernel;
  if (!k) return;
  free(k->rows);
  free(k->parts);
  free(k->pieces[0]);
  free(k->pieces[1]);
  free(k);
}

static OrtStatus *refuse(const OrtApi *api, const char *message) {
  return ORT(api, CreateStatus)(ORT_INVALID_ARGUMENT, message);
}

/* Reads an attribute of integers; *out is to be freed. */
static OrtStatus *integers_of(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t **out, size_t *count) {
  OrtStatus *status = ORT(api, KernelInfoGetAttributeArray_int64)(info, name, NULL, count);
  if (status) return status;
  *out = calloc(*count + 1, sizeof **out);
  return *out ? ORT(api, KernelInfoGetAttributeArray_int64)(info, name, *out, count) : refuse(api, "out of memory");
}

/* Takes a tensor: constant bytes, so many, aligned as the kernels read them. */
static OrtStatus *take_bytes(const OrtApi *api, const OrtKernelInfo *info, size_t input, size_t wanted,
                             const uint8_t **out) {
  const OrtValue *value = NULL;
  OrtTensorTypeAndShapeInfo *shape = NULL;
  int constant = 0, type = 0;
  size_t size = 0;
  void *data = NULL;
  OrtStatus *status = ORT(api, KernelInfoGetConstantInput_tensor)(info, input, &constant, &value);
  if (status) return status;
  if (!constant || !value) return refuse(api, "Linear: its tiles must be a constant of the model");
  if ((status = ORT(api, GetTensorTypeAndShape)(value, &shape))) return status;
  status = ORT(api, GetTensorElementType)(shape, &type);
  if (!status) status = ORT(api, GetTensorShapeElementCount)(shape, &size);
  ((void (*const *)(OrtTensorTypeAndShapeInfo *))(const void *)api)[FLRC_ORT_RELEASE_SHAPE](shape);
  if (!status) status = ORT(api, GetTensorMutableData)(value, &data);
  if (status) return status;
  if (type != ORT_UINT8) return refuse(api, "Linear: its tiles must be uint8");
  if (size != wanted) return refuse(api, "Linear: a tensor does not have the size that rows, columns and width make");
  if ((uintptr_t)data % FLRC_LINE) return refuse(api, "Linear: its tiles must begin at a multiple of 64 bytes");
  *out = data;
  return NULL;
}

static OrtStatus *take_plane(const OrtApi *api, const OrtKernelInfo *info, size_t input, flrc_plane *plane) {
  return take_bytes(api, info, input, flrc_group_bytes(plane) * (size_t)plane->groups, &plane->data);
}

static int32_t order_at(const uint8_t *order, int64_t i) {
  const uint8_t *b = order + 4 * i;
  return (int32_t)((uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
}

/* Takes the order of a pivoted pair, which must name every output once. */
static OrtStatus *take_order(const OrtApi *api, const OrtKernelInfo *info, size_t input, int64_t rows,
                             const uint8_t **order) {
  OrtStatus *status = take_bytes(api, info, input, 4 * (size_t)rows, order);
  if (status) return status;
  uint8_t *seen = calloc((size_t)rows, 1);
  bool all = seen != NULL;
  for (int64_t i = 0; all && i < rows; i++) {
    int32_t row = order_at(*order, i);
    all = row >= 0 && row < rows && !seen[row];
    if (all) seen[row] = 1;
  }
  free(seen);
  return all ? NULL : refuse(api, "Linear: the order of a pivoted pair does not name every output once");
}

static bool is_width(int64_t width) { return width >= 2 && width <= 8 && width != 7; }

/* Fills k->parts from the attributes `parts` and `scales`. */
static OrtStatus *take_parts(linear *k, const OrtKernelInfo *info, const int64_t *numbers, const float *scales,
                             size_t floats) {
  size_t input = 1, planes = 0;
  int64_t before = 0, ranks = 0, apart = 0;
  bool factored = false;
  for (int32_t i = 0; i < k->count; i++, numbers += 6) {
    int64_t projection = numbers[0], width = numbers[1], second = numbers[2], stored = numbers[3], read = numbers[4];
    int64_t pivoted = numbers[5];
    part *p = k->parts + i;
    if (projection < before || projection > before + (i > 0) || projection >= k->projections)
      return refuse(k->api, "Linear: parts must come in the order of their projections, at least one each");
    p->first = i == 0 || projection != before;
    if (p->first) factored = false;
    before = projection;
    if (!is_width(width) || (second && !is_width(second)))
      return refuse(k->api, "Linear: a part's width must be 2, 3, 4, 5, 6 or 8");
    if (second ? stored < 1 || stored > 1 << 20 || read < 1 || read > stored || (read % FLRC_BLOCK && read != stored)
               : stored != 0 || read != 0)
      return refuse(k->api, "Linear: a part's ranks must be 0, or those stored and a multiple of 32 of them");
    int64_t rows = k->rows[projection];
    if (pivoted ? pivoted != 1 || !second || read != stored || stored >= rows : 0)
      return refuse(k->api, "Linear: a pivoted part must be a pair of less ranks than rows, all read");
    if (factored && (!second || pivoted != (p[-1].order != NULL)))
      return refuse(k->api, "Linear: planes must come before factor pairs, and these be all pivoted or none");
    factored = second != 0;
    if (planes + (second ? 2 : 1) > floats) return refuse(k->api, "Linear: there are fewer scales than planes");
    p->projection = (int32_t)projection;
    p->ranks = (int32_t)read;
    p->place = (int32_t)ranks;
    flrc_plane plane = {NULL, filled(second ? stored : rows), k->blocks, (int32_t)width, scales[planes++]};
    p->plane = plane;
    OrtStatus *status = take_plane(k->api, info, input++, &p->plane);
    if (!status && second) {
      int32_t blocks = (int32_t)((stored + FLRC_BLOCK - 1) / FLRC_BLOCK);
      flrc_plane other = {NULL, filled(pivoted ? rows - stored : rows), blocks, (int32_t)second, scales[planes++]};
      p->second = other;
      status = take_plane(k->api, info, input++, &p->second);
      if (!status && pivoted) {
        status = take_order(k->api, info, input++, rows, &p->order);
        p->offset = (int32_t)apart;
        apart += FLRC_ROWS * (int64_t)p->second.groups;
      }
      ranks += (read + FLRC_BLOCK - 1) / FLRC_BLOCK * FLRC_BLOCK;
    }
    if (status) return status;
  }
  if (before != k->projections - 1) return refuse(k->api, "Linear: a projection has no part");
  size_t given = 0;
  OrtStatus *status = ORT(k->api, KernelInfo_GetInputCount)(info, &given);
  if (status) return status;
  if (given != input || floats != planes) return refuse(k->api, "Linear: there are more planes than parts name");
  if (ranks > 1 << 30 || apart > 1 << 30) return refuse(k->api, "Linear: it has too many ranks");
  k->ranks = (int32_t)ranks;
  k->apart = (int32_t)apart;
  return NULL;
}

/* Cuts the rows of a product into pieces of about PIECE bytes; of a null list, counts them. */
static int32_t cut(piece *list, int32_t made, int32_t of, int32_t groups, size_t bytes) {
  int32_t each = (int32_t)(PIECE / (bytes ? bytes : 1));
  if (each < 1) each = 1;
  for (int32_t from = 0; from < groups; from += each, made++) {
    if (list) {
      piece p = {of, from, from + each < groups ? from + each : groups};
      list[made] = p;
    }
  }
  return made;
}

static int32_t cut_all(const linear *k, int order, piece *list) {
  int32_t made = 0;
  for (int32_t i = 0; i < k->count; i++) {
    const part *p = k->parts + i;
    if (order == 0 && p->second.data) {
      made = cut(list, made, i, filled(p->ranks), flrc_group_bytes(&p->plane));
    } else if (order == 0 && p->first) {
      made = cut(list, made, i, p->plane.groups, flrc_group_bytes(&p->plane));
    } else if (order == 1 && p->second.data && (p->order || p->first || !k->parts[i - 1].second.data)) {
      /* A pivoted pair by itself, the others of a projection together. */
      made = cut(list, made, i, p->second.groups, flrc_group_bytes(&p->second));
    }
  }
  return made;
}

static OrtStatus *build(linear *k, const OrtKernelInfo *info) {
  const OrtApi *api = k->api;
  int64_t inputs = 0, *numbers = NULL;
  size_t rows = 0, parts = 0, floats = 0, outputs = 0;
  float *scales = NULL;
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, "columns", &inputs);
  if (!status) status = integers_of(api, info, "rows", &k->rows, &rows);
  if (!status) status = integers_of(api, info, "parts", &numbers, &parts);
  if (!status) status = ORT(api, KernelInfoGetAttributeArray_float)(info, "scales", NULL, &floats);
  if (!status && !(scales = calloc(floats + 1, sizeof *scales))) status = refuse(api, "out of memory");
  if (!status) status = ORT(api, KernelInfoGetAttributeArray_float)(info, "scales", scales, &floats);
  if (!status) status = ORT(api, KernelInfo_GetOutputCount)(info, &outputs);
  if (!status && (inputs < 1 || inputs > 1 << 20)) status = refuse(api, "Linear: columns must be 1 to 2^20");
  if (!status && (rows < 1 || rows > MOST_OUTPUTS || rows != outputs)) status = refuse(api, "Linear: rows must name every output");
  for (size_t i = 0; !status && i < rows; i++)
    if (k->rows[i] < 1 || k->rows[i] > 1 << 24) status = refuse(api, "Linear: rows must be 1 to 2^24");
  if (!status && (parts < 6 || parts % 6 || parts > 6 * 1024)) status = refuse(api, "Linear: parts are six numbers each");
  for (size_t i = 0; !status && i < floats; i++)
    if (!(scales[i] > 0 && scales[i] < 1e9f)) status = refuse(api, "Linear: scales must be positive");
  if (!status) {
    k->inputs = (int32_t)inputs;
    k->blocks = (k->inputs + FLRC_BLOCK - 1) / FLRC_BLOCK;
    k->projections = (int32_t)rows;
    k->count = (int32_t)(parts / 6);
    k->parts = calloc((size_t)k->count, sizeof *k->parts);
    status = k->parts ? take_parts(k, info, numbers, scales, floats) : refuse(api, "out of memory");
  }
  for (int order = 0; !status && order < 2; order++) {
    k->made[order] = cut_all(k, order, NULL);
    k->pieces[order] = calloc((size_t)k->made[order] + 1, sizeof(piece));
    if (k->pieces[order]) cut_all(k, order, k->pieces[order]);
    else status = refuse(api, "out of memory");
  }
  free(numbers);
  free(scales);
  return status;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  linear *k = calloc(1, sizeof *k);
  if (!k) return refuse(api, "out of memory");
  k->api = api;
  k->product = flrc_best_product(NULL);
  OrtStatus *status = k->product ? build(k, info) : refuse(api, "FLRC_EDGE_ISA names no instruction set of this machine");
  if (status) {
    destroy(k);
    k = NULL;
  }
  *out = k;
  return status;
}

/* One run: what its pieces share. */
typedef struct {
  const linear *k;
  const float *values; /* x */
  flrc_inputs x;
  flrc_inputs inner;   /* V x: the blocks of all parts' ranks, one behind another */
  float *reduced;      /* V x, [tokens][ranks of all parts] */
  float *apart;        /* U V x of pivoted pairs, [tokens][rows of all] */
  float *outputs[MOST_OUTPUTS]; /* [tokens][rows, filled up to groups] */
  bool *finite;        /* [tokens] */
  float *filled_up;    /* x with zeros up to a block, [tokens][32 * blocks]; NULL where there is nothing to fill */
} run;

static ptrdiff_t stride_of(const linear *k, int32_t projection) { return FLRC_ROWS * (ptrdiff_t)filled(k->rows[projection]); }

/* V x of a pair, or the planes of a projection. */
static void first_products(void *data, size_t index) {
  const run *r = data;
  const linear *k = r->k;
  piece p = k->pieces[0][index];
  const part *of = k->parts + p.part;
  if (of->second.data) {
    k->product(&of->plane, &r->x, p.from, p.to, r->reduced + of->place, k->ranks, false);
    return;
  }
  float *y = r->outputs[of->projection];
  for (int32_t i = p.part; i < k->count && k->parts[i].projection == of->projection && !k->parts[i].second.data; i++)
    k->product(&k->parts[i].plane, &r->x, p.from, p.to, y, stride_of(k, of->projection), i > p.part);
}

static flrc_inputs inner_of(const run *r, const part *of) {
  flrc_inputs inner = r->inner;
  inner.integers += of->place;
  inner.scales += of->place / FLRC_BLOCK;
  inner.sums += of->place / FLRC_BLOCK;
  inner.blocks = (of->ranks + FLRC_BLOCK - 1) / FLRC_BLOCK;
  return inner;
}

/* U of the pairs of a projection, on to what its planes gave; of a pivoted pair, apart. */
static void second_products(void *data, size_t index) {
  const run *r = data;
  const linear *k = r->k;
  piece p = k->pieces[1][index];
  const part *begin = k->parts + p.part;
  if (begin->order) {
    flrc_inputs inner = inner_of(r, begin);
    k->product(&begin->second, &inner, p.from, p.to, r->apart + begin->offset, k->apart, false);
    return;
  }
  for (int32_t i = p.part; i < k->count && k->parts[i].projection == begin->projection; i++) {
    const part *of = k->parts + i;
    flrc_inputs inner = inner_of(r, of);
    k->product(&of->second, &inner, p.from, p.to, r->outputs[of->projection], stride_of(k, of->projection), !of->first);
  }
}

/* V x and U V x of pivoted pairs, to the outputs that they are; part after part, so that sums have one order. */
static void place_pivoted(const run *r, int32_t token) {
  const linear *k = r->k;
  for (int32_t i = 0; i < k->count; i++) {
    const part *of = k->parts + i;
    if (!of->order) continue;
    float *y = r->outputs[of->projection] + token * stride_of(k, of->projection);
    const float *pivots = r->reduced + (ptrdiff_t)token * k->ranks + of->place;
    const float *others = r->apart + (ptrdiff_t)token * k->apart + of->offset - of->ranks;
    for (int64_t row = 0; row < k->rows[of->projection]; row++) {
      float value = row < of->ranks ? pivots[row] : others[row];
      float *out = y + order_at(of->order, row);
      *out = of->first ? value : *out + value;
    }
  }
}

static void quantize(void *data, size_t token) {
  const run *r = data;
  const linear *k = r->k;
  const float *values = r->values + token * (size_t)k->inputs;
  size_t place = token * (size_t)k->blocks;
  if (r->filled_up) {
    float *own = r->filled_up + place * FLRC_BLOCK;
    memcpy(own, values, (size_t)k->inputs * sizeof *own);
    values = own;
  }
  r->finite[token] = flrc_quantize(values, k->blocks, (int8_t *)r->x.integers + place * FLRC_BLOCK,
                                   (float *)r->x.scales + place, (int32_t *)r->x.sums + place);
}

static void quantize_inner(void *data, size_t token) {
  const run *r = data;
  size_t blocks = (size_t)r->inner.stride, place = token * blocks;
  r->finite[token] &= flrc_quantize(r->reduced + place * FLRC_BLOCK, (int32_t)blocks,
                                    (int8_t *)r->inner.integers + place * FLRC_BLOCK, (float *)r->inner.scales + place,
                                    (int32_t *)r->inner.sums + place);
}

/* Does the pieces on the session's threads; one alone here. */
static OrtStatus *spread(const linear *k, const OrtKernelContext *context, void (*work)(void *, size_t), size_t count,
                         run *r) {
  if (count > 1) return ORT(k->api, KernelContext_ParallelFor)(context, work, count, 0, r);
  if (count) work(r, 0);
  return NULL;
}

/* A part of memory that was taken at once, at a multiple of 64 bytes. */
static void *next(uint8_t **at, size_t size) {
  void *found = *at;
  *at += (size + FLRC_LINE - 1) / FLRC_LINE * FLRC_LINE;
  return found;
}

static OrtStatus *all_products(const OrtKernelContext *context, run *r) {
  const linear *k = r->k;
  size_t tokens = (size_t)r->x.tokens;
  OrtStatus *status = spread(k, context, quantize, tokens, r);
  if (!status) status = spread(k, context, first_products, (size_t)k->made[0], r);
  if (!status && k->made[1]) {
    status = spread(k, context, quantize_inner, tokens, r);
    if (!status) status = spread(k, context, second_products, (size_t)k->made[1], r);
    if (!status && k->apart)
      for (int32_t t = 0; t < r->x.tokens; t++) place_pivoted(r, t);
  }
  for (size_t t = 0; !status && t < tokens; t++)
    if (!r->finite[t]) status = refuse(k->api, "Linear: x holds a value that is not finite");
  return status;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const linear *k = kernel;
  const OrtApi *api = k->api;
  const OrtValue *x = NULL;
  OrtTensorTypeAndShapeInfo *shape = NULL;
  size_t axes = 0, count = 0;
  int64_t dimensions[8] = {0};
  void *values = NULL;
  OrtStatus *status = ORT(api, KernelContext_GetInput)(context, 0, &x);
  if (!status) status = ORT(api, GetTensorTypeAndShape)(x, &shape);
  if (status) return status;
  status = ORT(api, GetDimensionsCount)(shape, &axes);
  if (!status && (axes < 1 || axes > 8)) status = refuse(api, "Linear: x must have 1 to 8 axes");
  if (!status) status = ORT(api, GetDimensions)(shape, dimensions, axes);
  if (!status) status = ORT(api, GetTensorShapeElementCount)(shape, &count);
  ((void (*const *)(OrtTensorTypeAndShapeInfo *))(const void *)api)[FLRC_ORT_RELEASE_SHAPE](shape);
  if (!status && dimensions[axes - 1] != k->inputs) status = refuse(api, "Linear: x does not have the columns it says");
  if (!status && count / (size_t)k->inputs > 1 << 20) status = refuse(api, "Linear: x has too many rows");
  if (!status) status = ORT(api, GetTensorMutableData)(x, &values);
  if (status) return status;

  size_t tokens = count / (size_t)k->inputs, blocks = (size_t)k->blocks, inner = (size_t)k->ranks / FLRC_BLOCK;
  bool fill = k->inputs % FLRC_BLOCK != 0;
  size_t size = 12 * FLRC_LINE + tokens * (blocks + inner) * (FLRC_BLOCK + 8) + tokens * (4 * (size_t)(k->ranks + k->apart) + 1) +
                (fill ? tokens * blocks * FLRC_BLOCK * 4 : 0);
  for (int32_t i = 0; i < k->projections; i++) size += FLRC_LINE + tokens * 4 * (size_t)stride_of(k, i);
  uint8_t *memory = calloc(1, size);
  if (!memory) return refuse(api, "out of memory");
  uint8_t *at = memory + (FLRC_LINE - (uintptr_t)memory % FLRC_LINE) % FLRC_LINE;
  run r = {.k = k, .values = values};
  int8_t *integers = next(&at, tokens * blocks * FLRC_BLOCK);
  float *scales = next(&at, tokens * blocks * 4);
  int32_t *sums = next(&at, tokens * blocks * 4);
  flrc_inputs own = {integers, scales, sums, (int32_t)tokens, k->blocks, k->blocks};
  r.x = own;
  integers = next(&at, tokens * inner * FLRC_BLOCK);
  scales = next(&at, tokens * inner * 4);
  sums = next(&at, tokens * inner * 4);
  flrc_inputs reduced = {integers, scales, sums, (int32_t)tokens, (int32_t)inner, 0};
  r.inner = reduced;
  r.reduced = next(&at, tokens * (size_t)k->ranks * 4);
  r.apart = next(&at, tokens * (size_t)k->apart * 4);
  r.finite = next(&at, tokens);
  if (fill) r.filled_up = next(&at, tokens * blocks * FLRC_BLOCK * 4);
  float *written[MOST_OUTPUTS];
  for (int32_t i = 0; !status && i < k->projections; i++) {
    OrtValue *y = NULL;
    void *out = NULL;
    dimensions[axes - 1] = k->rows[i];
    status = ORT(api, KernelContext_GetOutput)(context, (size_t)i, dimensions, axes, &y);
    if (!status) status = ORT(api, GetTensorMutableData)(y, &out);
    written[i] = out;
    r.outputs[i] = k->rows[i] % FLRC_ROWS ? next(&at, tokens * 4 * (size_t)stride_of(k, i)) : out;
  }
  if (!status && tokens) status = all_products(context, &r);
  for (int32_t i = 0; !status && i < k->projections; i++) {
    if (r.outputs[i] == written[i]) continue;
    for (size_t t = 0; t < tokens; t++)
      memcpy(written[i] + t * (size_t)k->rows[i], r.outputs[i] + t * (size_t)stride_of(k, i), (size_t)k->rows[i] * 4);
  }
  free(memory);
  return status;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "Linear"; }
static const char *any_provider(const OrtCustomOp *op) { return (void)op, NULL; }
static int input_type(const OrtCustomOp *op, size_t i) { return (void)op, i ? ORT_UINT8 : ORT_FLOAT; }
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_FLOAT; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, 2; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int input_characteristic(const OrtCustomOp *op, size_t i) { return (void)op, i ? ORT_VARIADIC : ORT_REQUIRED; }
static int output_characteristic(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_VARIADIC; }
static int default_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

const OrtCustomOp flrc_linear = {
    .version = FLRC_ORT_VERSION,
    .get_name = name,
    .get_execution_provider = any_provider,
    .get_input_type = input_type,
    .get_input_count = input_count,
    .get_output_type = output_type,
    .get_output_count = output_count,
    .destroy_kernel = destroy,
    .get_input_characteristic = input_characteristic,
    .get_output_characteristic = output_characteristic,
    .get_input_memory = default_memory,
    .get_variadic_input_least = one,
    .get_variadic_input_alike = one,
    .get_variadic_output_least = one,
    .get_variadic_output_alike = one,
    .create_kernel_2 = create,
    .compute_2 = compute,
    .get_first_version = one,
    .get_last_version = any_version,
};
