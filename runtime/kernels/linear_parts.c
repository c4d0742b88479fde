/* The creation of flrc.Linear: its attributes and constants, which are all checked here. */
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "scratch.h"

void flrc_linear_destroy(void *kernel) {
  flrc_linear_kernel *k = kernel;
  if (!k) return;
  free(k->rows);
  free(k->bias);
  free(k->parts);
  free(k->pieces[0]);
  free(k->pieces[1]);
  free(k);
  flrc_scratch_leave();
}

static OrtStatus *take_plane(const OrtApi *api, const OrtKernelInfo *info, size_t input, flrc_plane *plane) {
  return take_tiles(api, info, input, flrc_group_bytes(plane) * (size_t)plane->groups, &plane->data);
}

/* Takes the order of a pivoted pair, which must name every output once. */
static OrtStatus *take_order(const OrtApi *api, const OrtKernelInfo *info, size_t input, int64_t rows,
                             const uint8_t **order) {
  const void *data = NULL;
  OrtStatus *status = take_constant(api, info, input, ORT_UINT8, 4 * (size_t)rows, &data);
  if (status) return status;
  *order = data;
  uint8_t *seen = calloc((size_t)rows, 1);
  bool all = seen != NULL;
  for (int64_t i = 0; all && i < rows; i++) {
    int32_t row = flrc_order_at(*order, i);
    all = row >= 0 && row < rows && !seen[row];
    if (all) seen[row] = 1;
  }
  free(seen);
  return all ? NULL : refuse(api, "Linear: the order of a pivoted pair does not name every output once");
}

static bool is_width(int64_t width) { return (width >= 2 && width <= 8 && width != 7) || width == FLRC_FLOAT; }

/* Fills k->parts from the attributes `parts` and `scales`. */
static OrtStatus *take_parts(flrc_linear_kernel *k, const OrtKernelInfo *info, const int64_t *numbers, const float *scales,
                             size_t given_scales) {
  size_t input = IN_TILES, planes = 0;
  int64_t before = 0, ranks = 0, apart = 0;
  bool factored = false;
  for (int32_t i = 0; i < k->count; i++, numbers += 6) {
    int64_t projection = numbers[0], width = numbers[1], second = numbers[2], stored = numbers[3], read = numbers[4];
    int64_t pivoted = numbers[5];
    flrc_part *p = k->parts + i;
    if (projection < before || projection > before + (i > 0) || projection >= k->projections)
      return refuse(k->api, "Linear: parts must come in the order of their projections, at least one each");
    p->first = p->alone = i == 0 || projection != before;
    if (!p->first) p[-1].alone = false;
    if (p->first) factored = false;
    before = projection;
    if (!is_width(width) || (second && !is_width(second)))
      return refuse(k->api, "Linear: a part's width must be 2, 3, 4, 5, 6, 8 or 32");
    if (second ? stored < 1 || stored > 1 << 20 || read < 1 || read > stored || (read % FLRC_BLOCK && read != stored)
               : stored != 0 || read != 0)
      return refuse(k->api, "Linear: a part's ranks must be 0, or those stored and a multiple of 32 of them");
    int64_t rows = k->rows[projection];
    if (pivoted ? pivoted != 1 || !second || read != stored || stored >= rows : 0)
      return refuse(k->api, "Linear: a pivoted part must be a pair of less ranks than rows, all read");
    if (factored && (!second || pivoted != (p[-1].order != NULL)))
      return refuse(k->api, "Linear: planes must come before factor pairs, and these be all pivoted or none");
    factored = second != 0;
    if (planes + (second ? 2 : 1) > given_scales) return refuse(k->api, "Linear: there are fewer scales than planes");
    p->projection = (int32_t)projection;
    p->ranks = (int32_t)read;
    p->place = (int32_t)ranks;
    *(width == FLRC_FLOAT ? &k->floats : &k->integers) = true;
    flrc_plane plane = {NULL, flrc_groups(second ? stored : rows), k->blocks, (int32_t)width, scales[planes++]};
    p->plane = plane;
    OrtStatus *status = take_plane(k->api, info, input++, &p->plane);
    if (!status && second) {
      flrc_plane other = {NULL, flrc_groups(pivoted ? rows - stored : rows), flrc_blocks(stored), (int32_t)second,
                          scales[planes++]};
      p->second = other;
      k->inner_integers |= second != FLRC_FLOAT;
      status = take_plane(k->api, info, input++, &p->second);
      if (!status && pivoted) {
        status = take_order(k->api, info, input++, rows, &p->order);
        p->offset = (int32_t)apart;
        apart += FLRC_ROWS * (int64_t)p->second.groups;
      }
      ranks += flrc_blocks(read) * FLRC_BLOCK;
    }
    if (status) return status;
    if (ranks > 1 << 30 || apart > 1 << 30) return refuse(k->api, "Linear: it has too many ranks");
  }
  if (before != k->projections - 1) return refuse(k->api, "Linear: a projection has no part");
  size_t given = 0;
  OrtStatus *status = ORT(k->api, KernelInfo_GetInputCount)(info, &given);
  if (status) return status;
  if (given != input || given_scales != planes) return refuse(k->api, "Linear: there are more planes than parts name");
  k->ranks = (int32_t)ranks;
  k->apart = (int32_t)apart;
  return NULL;
}

/* Whether the node names an optional input. */
static OrtStatus *is_there(const OrtApi *api, const OrtKernelInfo *info, size_t input, bool *there) {
  size_t size = 0; /* of its name, with the 0 behind it */
  OrtStatus *status = ORT(api, KernelInfo_GetInputName)(info, input, NULL, &size);
  *there = size > 1;
  return status;
}

/* Takes norms and bias, and what the attributes say of norms and of the gate. */
static OrtStatus *take_prologue(flrc_linear_kernel *k, const OrtKernelInfo *info) {
  const OrtApi *api = k->api;
  bool post_norm = false, norm = false, bias = false;
  const void *data = NULL;
  OrtStatus *status = is_there(api, info, IN_GATE, &k->gate);
  if (!status) status = is_there(api, info, IN_POST_NORM, &post_norm);
  if (!status) status = is_there(api, info, IN_NORM, &norm);
  if (!status) status = is_there(api, info, IN_BIAS, &bias);
  if (!status) status = is_there(api, info, IN_START, &k->start);
  if (!status && post_norm) {
    status = take_constant(api, info, IN_POST_NORM, ORT_FLOAT, (size_t)k->columns, &data);
    k->post_norm = data;
  }
  if (!status && norm) {
    status = take_constant(api, info, IN_NORM, ORT_FLOAT, (size_t)k->columns, &data);
    k->norm = data;
  }
  if (!status && (norm || post_norm)) {
    status = ORT(api, KernelInfoGetAttribute_float)(info, "epsilon", &k->epsilon);
    if (!status && !(k->epsilon >= 1e-30f && k->epsilon <= 1e9f))
      status = refuse(api, "Linear: epsilon must be positive");
  }
  if (!status && k->gate) {
    char activation[16] = "";
    size_t size = sizeof activation;
    status = ORT(api, KernelInfoGetAttribute_string)(info, "activation", activation, &size);
    k->gelu = !status && strcmp(activation, "gelu_tanh") == 0;
    if (!status && !k->gelu && strcmp(activation, "silu") != 0)
      status = refuse(api, "Linear: activation must be silu or gelu_tanh");
  }
  if (status || !bias) return status;
  size_t rows = 0, filled = 0;
  for (int32_t i = 0; i < k->projections; i++) {
    rows += (size_t)k->rows[i];
    filled += FLRC_ROWS * (size_t)flrc_groups(k->rows[i]);
  }
  if ((status = take_constant(api, info, IN_BIAS, ORT_FLOAT, rows, &data))) return status;
  k->bias = calloc(filled, sizeof *k->bias);
  if (!k->bias) return refuse(api, "out of memory");
  const float *from = data;
  float *to = k->bias;
  for (int32_t i = 0; i < k->projections; i++) {
    memcpy(to, from, (size_t)k->rows[i] * sizeof *to);
    from += k->rows[i];
    to += FLRC_ROWS * flrc_groups(k->rows[i]);
  }
  return NULL;
}

#define LEAST_PIECE (8 * 1024) /* bytes of weights that a thread takes at a time */
#define MOST_PIECE (64 * 1024)
#define PIECES 16 /* of a pass that is neither large nor small */

/* Gives the product that begins with part i in a pass: its rows and the bytes of a group of them; false if there is none. */
static bool product_of(const flrc_linear_kernel *k, int pass, int32_t i, int32_t *groups, size_t *bytes) {
  const flrc_part *p = k->parts + i;
  bool pair = p->second.data != NULL;
  if (pass == 0) {
    if (!pair && !p->first) return false;
    *groups = pair ? flrc_groups(p->ranks) : p->plane.groups;
    *bytes = flrc_group_bytes(&p->plane);
    return true;
  }
  /* A pivoted pair by itself, the others of a projection together. */
  if (!pair || !(p->order || p->first || !k->parts[i - 1].second.data)) return false;
  *groups = p->second.groups;
  *bytes = flrc_group_bytes(&p->second);
  return true;
}

/* Cuts a pass into pieces: so many that threads end together, and that one which loses its core holds up little. */
static OrtStatus *cut(flrc_linear_kernel *k, int pass) {
  int32_t groups = 0;
  size_t bytes = 0, all = 0, most = 0;
  for (int32_t i = 0; i < k->count; i++)
    if (product_of(k, pass, i, &groups, &bytes)) {
      all += (size_t)groups * bytes;
      most += (size_t)groups;
    }
  size_t piece = all / PIECES < LEAST_PIECE ? LEAST_PIECE : all / PIECES < MOST_PIECE ? all / PIECES : MOST_PIECE;
  k->pieces[pass] = calloc(most + 1, sizeof(flrc_piece));
  if (!k->pieces[pass]) return refuse(k->api, "out of memory");
  for (int32_t i = 0; i < k->count; i++) {
    if (!product_of(k, pass, i, &groups, &bytes)) continue;
    int32_t each = (int32_t)(piece / bytes) < 1 ? 1 : (int32_t)(piece / bytes);
    for (int32_t from = 0; from < groups; from += each) {
      flrc_piece made = {i, from, groups - from > each ? from + each : groups};
      k->pieces[pass][k->made[pass]++] = made;
    }
  }
  return NULL;
}

static OrtStatus *build(flrc_linear_kernel *k, const OrtKernelInfo *info) {
  const OrtApi *api = k->api;
  int64_t columns = 0, *numbers = NULL;
  size_t rows = 0, parts = 0, count = 0, outputs = 0;
  float *scales = NULL;
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, "columns", &columns);
  if (!status) status = integers_of(api, info, "rows", &k->rows, &rows);
  if (!status) status = integers_of(api, info, "parts", &numbers, &parts);
  if (!status) status = ORT(api, KernelInfoGetAttributeArray_float)(info, "scales", NULL, &count);
  if (!status && !(scales = calloc(count + 1, sizeof *scales))) status = refuse(api, "out of memory");
  if (!status) status = ORT(api, KernelInfoGetAttributeArray_float)(info, "scales", scales, &count);
  if (!status) status = ORT(api, KernelInfo_GetOutputCount)(info, &outputs);
  if (!status) status = is_there(api, info, IN_RESIDUAL, &k->residual);
  if (!status && (columns < 1 || columns > 1 << 20)) status = refuse(api, "Linear: columns must be 1 to 2^20");
  if (!status && (rows < 1 || rows > FLRC_MOST_OUTPUTS || outputs != rows + k->residual))
    status = refuse(api, "Linear: rows must name every output but the sum that a residual makes");
  for (size_t i = 0; !status && i < rows; i++)
    if (k->rows[i] < 1 || k->rows[i] > 1 << 24) status = refuse(api, "Linear: rows must be 1 to 2^24");
  if (!status && (parts < 6 || parts % 6 || parts > 6 * 1024))
    status = refuse(api, "Linear: parts are six numbers each");
  for (size_t i = 0; !status && i < count; i++)
    if (!(scales[i] > 0 && scales[i] < 1e9f)) status = refuse(api, "Linear: scales must be positive");
  if (!status) {
    k->columns = (int32_t)columns;
    k->blocks = flrc_blocks(columns);
    k->projections = (int32_t)rows;
    k->count = (int32_t)(parts / 6);
    k->parts = calloc((size_t)k->count, sizeof *k->parts);
    status = k->parts ? take_parts(k, info, numbers, scales, count) : refuse(api, "out of memory");
  }
  if (!status) status = take_prologue(k, info);
  for (int pass = 0; !status && pass < 2; pass++) status = cut(k, pass);
  free(numbers);
  free(scales);
  return status;
}

OrtStatus *flrc_linear_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  flrc_linear_kernel *k = calloc(1, sizeof *k);
  if (!k) return refuse(api, "out of memory");
  flrc_scratch_join();
  k->api = api;
  k->isa = flrc_best_isa();
  OrtStatus *status =
      k->isa ? build(k, info) : refuse(api, "FLRC_EDGE_ISA names no instruction set of this machine");
  if (status) {
    flrc_linear_destroy(k);
    k = NULL;
  }
  *out = k;
  return status;
}
