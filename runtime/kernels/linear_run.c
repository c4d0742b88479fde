/* A run of flrc.Linear. Tokens are taken as many at a time as leave what lies between the passes in the cache:
 * activations are prepared, then all products that read them, then V x is rounded, then the products that read that.
 */
#include <stdatomic.h>
#include <string.h>

#include "linear.h"
#include "scratch.h"

#define SCRATCH (768 * 1024) /* bytes between the passes, about */
#define MOST_TOKENS 128      /* at a time */
#define SLICE 32             /* blocks of a lone token that a thread prepares, where its activation takes time */

/* What the pieces of a run share; of the tokens that are computed together. */
typedef struct {
  const flrc_linear_kernel *k;
  flrc_prologue prologue; /* of the first token */
  flrc_inputs x;
  flrc_inputs inner; /* V x: the blocks of all parts' ranks, one behind another */
  float *reduced;    /* V x, [tokens][ranks of all parts] */
  float *apart;      /* U V x of pivoted pairs, [tokens][rows of all] */
  float *written[FLRC_MOST_OUTPUTS]; /* [tokens][rows] */
  float *outputs[FLRC_MOST_OUTPUTS]; /* [tokens][rows, filled up to groups]: the same, or memory of the run */
  atomic_bool infinite;
} run;

static size_t stride_of(const flrc_linear_kernel *k, int32_t projection) {
  return FLRC_ROWS * (size_t)flrc_groups(k->rows[projection]);
}

static const float *bias_of(const flrc_linear_kernel *k, int32_t projection) {
  const float *bias = k->bias;
  for (int32_t i = 0; bias && i < projection; i++) bias += stride_of(k, i);
  return bias;
}

/* Tells that a value is not finite. */
static void tell(run *r, bool finite) {
  if (!finite) atomic_store_explicit(&r->infinite, true, memory_order_relaxed);
}

static const float *onward(const float *at, size_t by) { return at ? at + by : NULL; }

static void prepare(run *r, size_t token, int32_t first, int32_t last) {
  const flrc_linear_kernel *k = r->k;
  size_t columns = token * (size_t)k->columns, place = token * (size_t)r->x.stride;
  flrc_prologue p = r->prologue;
  p.x += columns;
  p.gate = onward(p.gate, columns);
  p.residual = onward(p.residual, columns);
  if (p.sum) p.sum += columns;
  flrc_prepared out = {0};
  if (k->integers) {
    out.integers = (int8_t *)r->x.integers + place * FLRC_BLOCK;
    out.scales = (float *)r->x.scales + place;
    out.sums = (int32_t *)r->x.sums + place;
  }
  if (k->floats) out.floats = (float *)r->x.floats + place * FLRC_BLOCK;
  tell(r, k->isa->prepare(&p, first, last, &out));
}

static void prepare_token(void *data, size_t token) {
  run *r = data;
  prepare(r, token, 0, r->k->blocks);
}

static void prepare_slice(void *data, size_t slice) {
  run *r = data;
  int32_t first = (int32_t)slice * SLICE, blocks = r->k->blocks;
  prepare(r, 0, first, blocks - first > SLICE ? first + SLICE : blocks);
}

static void multiply(const flrc_linear_kernel *k, const flrc_plane *plane, const flrc_inputs *x, flrc_piece p, float *y,
                     size_t stride, bool add) {
  flrc_product *product = plane->width == FLRC_FLOAT ? k->isa->floats : k->isa->product;
  product(plane, x, p.from, p.to, y, (ptrdiff_t)stride, add);
}

/* Puts the bias where a projection's parts are then added; false if there is none. */
static bool begin_with_bias(const run *r, int32_t projection, flrc_piece p) {
  const float *bias = bias_of(r->k, projection);
  if (!bias) return false;
  size_t from = FLRC_ROWS * (size_t)p.from, size = FLRC_ROWS * (size_t)(p.to - p.from) * sizeof *bias;
  for (int32_t t = 0; t < r->x.tokens; t++)
    memcpy(r->outputs[projection] + (size_t)t * stride_of(r->k, projection) + from, bias + from, size);
  return true;
}

/* Rows first .. last - 1 of V x or of U V x of a pivoted pair, to the outputs that they are; from `end` on there are none. */
static void put(const run *r, const flrc_part *of, size_t token, int64_t first, int64_t last, int64_t end) {
  const flrc_linear_kernel *k = r->k;
  float *y = r->outputs[of->projection] + token * stride_of(k, of->projection);
  const float *bias = bias_of(k, of->projection);
  const float *values = first < of->ranks ? r->reduced + token * (size_t)k->ranks + of->place + first
                                          : r->apart + token * (size_t)k->apart + of->offset + (first - of->ranks);
  const uint8_t *order = of->order + 4 * first;
  int64_t count = (last < end ? last : end) - first;
  if (!of->first) {
    for (int64_t i = 0; i < count; i++) y[flrc_order_at(order, i)] += values[i];
  } else if (bias) {
    for (int64_t i = 0; i < count; i++) y[flrc_order_at(order, i)] = bias[flrc_order_at(order, i)] + values[i];
  } else {
    for (int64_t i = 0; i < count; i++) y[flrc_order_at(order, i)] = values[i];
  }
}

/* Whether a piece puts what it computed where it belongs: of a lone token, so that nothing is left to do on one thread. Of
 * more, a token's outputs are put together while they are in the cache (finish_token).
 */
static bool at_once(const run *r, const flrc_part *of) { return of->alone && r->x.tokens == 1; }

/* V x of a pair, or the planes of a projection. */
static void first_products(void *data, size_t index) {
  const run *r = data;
  const flrc_linear_kernel *k = r->k;
  flrc_piece p = k->pieces[0][index];
  const flrc_part *of = k->parts + p.part;
  if (of->second.data) {
    multiply(k, &of->plane, &r->x, p, r->reduced + of->place, (size_t)k->ranks, false);
    if (of->order && at_once(r, of)) put(r, of, 0, FLRC_ROWS * p.from, FLRC_ROWS * p.to, of->ranks);
    return;
  }
  bool add = begin_with_bias(r, of->projection, p);
  for (int32_t i = p.part; i < k->count && k->parts[i].projection == of->projection && !k->parts[i].second.data; i++) {
    multiply(k, &k->parts[i].plane, &r->x, p, r->outputs[of->projection], stride_of(k, of->projection), add);
    add = true;
  }
}

static flrc_inputs inner_of(const run *r, const flrc_part *of) {
  flrc_inputs inner = r->inner;
  inner.integers += of->place;
  inner.scales += of->place / FLRC_BLOCK;
  inner.sums += of->place / FLRC_BLOCK;
  inner.floats += of->place;
  inner.blocks = flrc_blocks(of->ranks);
  return inner;
}

/* U of the pairs of a projection, on to what its planes gave; of a pivoted pair, apart. */
static void second_products(void *data, size_t index) {
  const run *r = data;
  const flrc_linear_kernel *k = r->k;
  flrc_piece p = k->pieces[1][index];
  const flrc_part *of = k->parts + p.part;
  if (of->order) {
    flrc_inputs inner = inner_of(r, of);
    multiply(k, &of->second, &inner, p, r->apart + of->offset, (size_t)k->apart, false);
    if (at_once(r, of))
      put(r, of, 0, of->ranks + FLRC_ROWS * p.from, of->ranks + FLRC_ROWS * p.to, k->rows[of->projection]);
    return;
  }
  bool add = !of->first || begin_with_bias(r, of->projection, p);
  for (int32_t i = p.part; i < k->count && k->parts[i].projection == of->projection; i++) {
    flrc_inputs inner = inner_of(r, k->parts + i);
    multiply(k, &k->parts[i].second, &inner, p, r->outputs[of->projection], stride_of(k, of->projection), add);
    add = true;
  }
}

/* Rounds V x; what its ranks lack to whole blocks is zero. */
static void prepare_inner(void *data, size_t token) {
  run *r = data;
  const flrc_linear_kernel *k = r->k;
  float *reduced = r->reduced + token * (size_t)k->ranks;
  for (int32_t i = 0; i < k->count; i++) {
    const flrc_part *p = k->parts + i;
    if (p->second.data && flrc_groups(p->ranks) % 2)
      memset(reduced + p->place + FLRC_ROWS * flrc_groups(p->ranks), 0, FLRC_ROWS * sizeof *reduced);
  }
  if (!k->inner_integers) return;
  size_t place = token * (size_t)r->inner.stride;
  flrc_prologue p = {.x = reduced, .columns = k->ranks};
  flrc_prepared out = {(int8_t *)r->inner.integers + place * FLRC_BLOCK, (float *)r->inner.scales + place,
                       (int32_t *)r->inner.sums + place, NULL};
  tell(r, k->isa->prepare(&p, 0, r->inner.stride, &out));
}

/* What is left: pivoted pairs, part after part, and outputs that lie apart. */
static void finish_token(void *data, size_t token) {
  const run *r = data;
  const flrc_linear_kernel *k = r->k;
  for (int32_t i = 0; i < k->count; i++) {
    const flrc_part *of = k->parts + i;
    int64_t rows = k->rows[of->projection];
    if (!of->order || at_once(r, of)) continue;
    put(r, of, token, 0, of->ranks, rows);
    put(r, of, token, of->ranks, rows, rows);
  }
  for (int32_t i = 0; i < k->projections; i++) {
    if (r->outputs[i] == r->written[i]) continue;
    memcpy(r->written[i] + token * (size_t)k->rows[i], r->outputs[i] + token * stride_of(k, i),
           (size_t)k->rows[i] * sizeof(float));
  }
}

/* Does the pieces on the session's threads; one alone here. */
static OrtStatus *spread(const OrtKernelContext *context, void (*work)(void *, size_t), size_t count, run *r) {
  if (count > 1) return ORT(r->k->api, KernelContext_ParallelFor)(context, work, count, 0, r);
  if (count) work(r, 0);
  return NULL;
}

static OrtStatus *all_products(const OrtKernelContext *context, run *r) {
  const flrc_linear_kernel *k = r->k;
  size_t tokens = (size_t)r->x.tokens;
  bool slices = tokens == 1 && k->gate && !k->post_norm && !k->norm && k->blocks >= 3 * SLICE;
  OrtStatus *status = slices ? spread(context, prepare_slice, (size_t)(k->blocks + SLICE - 1) / SLICE, r)
                             : spread(context, prepare_token, tokens, r);
  if (!status) status = spread(context, first_products, (size_t)k->made[0], r);
  if (!status && k->made[1]) {
    status = spread(context, prepare_inner, tokens, r);
    if (!status) status = spread(context, second_products, (size_t)k->made[1], r);
  }
  if (!status) status = spread(context, finish_token, tokens, r);
  if (!status && atomic_load(&r->infinite)) status = refuse(k->api, "Linear: x holds a value that is not finite");
  return status;
}

/* The next part of memory that was taken at once, at a multiple of 64 bytes; without memory, only counts. */
static void *next(uint8_t *memory, size_t *used, size_t size) {
  void *found = memory ? memory + *used : NULL;
  *used += (size + FLRC_LINE - 1) / FLRC_LINE * FLRC_LINE;
  return found;
}

static flrc_inputs lay_inputs(uint8_t *memory, size_t *used, size_t tokens, int32_t blocks) {
  size_t all = tokens * (size_t)blocks;
  int8_t *integers = next(memory, used, all * FLRC_BLOCK);
  float *scales = next(memory, used, all * sizeof(float));
  int32_t *sums = next(memory, used, all * sizeof(int32_t));
  flrc_inputs x = {integers, scales, sums, (int32_t)tokens, blocks, blocks, NULL};
  return x;
}

/* Lays out what so many tokens need; returns its bytes. */
static size_t lay_out(run *r, uint8_t *memory, size_t tokens) {
  const flrc_linear_kernel *k = r->k;
  size_t used = 0;
  r->x = lay_inputs(memory, &used, tokens, k->blocks);
  if (k->floats) r->x.floats = next(memory, &used, tokens * (size_t)k->blocks * FLRC_BLOCK * sizeof(float));
  r->inner = lay_inputs(memory, &used, tokens, k->ranks / FLRC_BLOCK);
  r->reduced = next(memory, &used, tokens * (size_t)k->ranks * sizeof(float));
  r->inner.floats = r->reduced;
  r->apart = next(memory, &used, tokens * (size_t)k->apart * sizeof(float));
  for (int32_t i = 0; i < k->projections; i++)
    r->outputs[i] = k->rows[i] % FLRC_ROWS ? next(memory, &used, tokens * stride_of(k, i) * sizeof(float)) : NULL;
  return used;
}

/* An optional input of x's shape. */
static OrtStatus *like_x(const flrc_linear_kernel *k, const OrtKernelContext *context, size_t index, const tensor *x,
                         const float **out) {
  tensor found = {0};
  OrtStatus *status = input_of(k->api, context, index, &found);
  if (status) return status;
  if (found.axes != x->axes || memcmp(found.size, x->size, (size_t)x->axes * sizeof *x->size) != 0)
    return refuse(k->api, "Linear: residual and gate must have the shape of x");
  *out = found.data;
  return NULL;
}

/* The position that `start` names, of so many. */
static OrtStatus *start_of(const flrc_linear_kernel *k, const OrtKernelContext *context, size_t positions, size_t *start) {
  tensor found = {0};
  OrtStatus *status = input_of(k->api, context, IN_START, &found);
  if (status) return status;
  if (found.count != 1) return refuse(k->api, "Linear: start must be one number");
  int64_t given = 0;
  memcpy(&given, found.data, sizeof given);
  if (given < -(int64_t)positions || given > (int64_t)positions)
    return refuse(k->api, "Linear: start is no position of x");
  *start = (size_t)(given < 0 ? given + (int64_t)positions : given);
  return NULL;
}

/* An output of x's shape but for its columns. */
static OrtStatus *with_columns(const flrc_linear_kernel *k, OrtKernelContext *context, size_t index, tensor *x, int64_t columns,
                               float **out) {
  void *data = NULL;
  x->size[x->axes - 1] = columns;
  OrtStatus *status = output_of(k->api, context, index, x->size, (size_t)x->axes, &data);
  *out = data;
  return status;
}

/* Takes the inputs and makes the outputs; *tokens becomes how many positions are computed. */
static OrtStatus *open(run *r, OrtKernelContext *context, size_t *tokens) {
  const flrc_linear_kernel *k = r->k;
  tensor x = {0};
  OrtStatus *status = input_of(k->api, context, IN_X, &x);
  if (status) return status;
  if (x.axes < 1 || x.size[x.axes - 1] != k->columns)
    return refuse(k->api, "Linear: x does not have the columns it says");
  *tokens = x.count / (size_t)k->columns;
  if (*tokens > 1 << 20) return refuse(k->api, "Linear: x has too many rows");
  flrc_prologue p = {.x = x.data, .post_norm = k->post_norm, .norm = k->norm, .columns = k->columns,
                     .epsilon = k->epsilon, .gelu = k->gelu};
  if (k->gate && (status = like_x(k, context, IN_GATE, &x, &p.gate))) return status;
  if (k->residual && (status = like_x(k, context, IN_RESIDUAL, &x, &p.residual))) return status;
  if (k->start) {
    size_t start = 0, columns = (size_t)k->columns;
    if (x.axes < 2 || x.size[x.axes - 2] != (int64_t)*tokens)
      return refuse(k->api, "Linear: with start, x must be one sequence");
    if ((status = start_of(k, context, *tokens, &start))) return status;
    *tokens -= start;
    x.size[x.axes - 2] = (int64_t)*tokens;
    p.x += start * columns;
    p.gate = onward(p.gate, start * columns);
    p.residual = onward(p.residual, start * columns);
  }
  for (int32_t i = 0; !status && i < k->projections; i++)
    status = with_columns(k, context, (size_t)i, &x, k->rows[i], r->written + i);
  if (!status && k->residual) status = with_columns(k, context, (size_t)k->projections, &x, k->columns, &p.sum);
  r->prologue = p;
  return status;
}

/* Turns to the next tokens. */
static void move(run *r, size_t by) {
  const flrc_linear_kernel *k = r->k;
  size_t columns = by * (size_t)k->columns;
  r->prologue.x += columns;
  r->prologue.gate = onward(r->prologue.gate, columns);
  r->prologue.residual = onward(r->prologue.residual, columns);
  if (r->prologue.sum) r->prologue.sum += columns;
  for (int32_t i = 0; i < k->projections; i++) r->written[i] += by * (size_t)k->rows[i];
}

OrtStatus *flrc_linear_compute(void *kernel, OrtKernelContext *context) {
  run r = {.k = kernel};
  size_t tokens = 0;
  OrtStatus *status = open(&r, context, &tokens);
  if (status || !tokens) return status;
  size_t at_once = SCRATCH / (lay_out(&r, NULL, 8) / 8 + 1) / 8 * 8;
  at_once = at_once < 8 ? 8 : at_once > MOST_TOKENS ? MOST_TOKENS : at_once;
  if (at_once > tokens) at_once = tokens;
  uint8_t *memory = flrc_scratch_take(lay_out(&r, NULL, at_once));
  if (!memory) return refuse(r.k->api, "out of memory");
  for (size_t from = 0; !status && from < tokens; from += at_once) {
    lay_out(&r, memory, tokens - from < at_once ? tokens - from : at_once);
    for (int32_t i = 0; i < r.k->projections; i++)
      if (!r.outputs[i]) r.outputs[i] = r.written[i];
    status = all_products(context, &r);
    move(&r, at_once);
  }
  flrc_scratch_give(memory);
  return status;
}
