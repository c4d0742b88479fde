/* The operator flrc.Embedding: rows of a plane of integers, or of floats, as floats.
 *
 * Inputs: ids int64 [1, S]; the plane's tiles (flrc_product.h), constant. Output: float [1, S, columns],
 * ((u - zero) * scale(row, block)) * factor.
 * Attributes: rows, columns, width of the plane and its `scale`; factor, 1 if it is missing.
 * A plane of width 32 holds float32: a line of 64 bytes an input, one float a row of the group, and no scales.
 */
#include <math.h>
#include <string.h>

#include "operator.h"
#include "tile.h"

#define TOKENS 16 /* that a thread takes at a time */

typedef struct {
  const OrtApi *api;
  flrc_plane plane;
  int64_t rows;
  int32_t columns;
  float factor;
} embedding;

typedef struct {
  const embedding *k;
  const int64_t *ids;
  size_t tokens;
  float *y;
} run;

static void destroy(void *kernel) { free(kernel); }

static OrtStatus *build(embedding *k, const OrtKernelInfo *info) {
  const OrtApi *api = k->api;
  int64_t columns = 0, width = 0;
  float scale = 0;
  k->factor = 1;
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, "rows", &k->rows);
  if (!status) status = ORT(api, KernelInfoGetAttribute_int64)(info, "columns", &columns);
  if (!status) status = ORT(api, KernelInfoGetAttribute_int64)(info, "width", &width);
  if (!status) status = ORT(api, KernelInfoGetAttribute_float)(info, "scale", &scale);
  if (status) return status;
  maybe_float(api, info, "factor", &k->factor);
  if (k->rows < 1 || k->rows > 1 << 24) return refuse(api, "Embedding: rows must be 1 to 2^24");
  if (columns < 1 || columns > 1 << 20) return refuse(api, "Embedding: columns must be 1 to 2^20");
  if (width != 32 && (width < 2 || width > 8 || width == 7))
    return refuse(api, "Embedding: width must be 2, 3, 4, 5, 6, 8 or 32");
  if (!(scale > 0 && scale < 1e9f)) return refuse(api, "Embedding: scale must be positive");
  if (!isfinite(k->factor)) return refuse(api, "Embedding: factor must be finite");
  k->columns = (int32_t)columns;
  flrc_plane plane = {NULL, (int32_t)((k->rows + FLRC_ROWS - 1) / FLRC_ROWS),
                      (k->columns + FLRC_BLOCK - 1) / FLRC_BLOCK, (int32_t)width, scale};
  k->plane = plane;
  return take_tiles(api, info, 1, flrc_group_bytes(&plane) * (size_t)plane.groups, &k->plane.data);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  embedding *k = calloc(1, sizeof *k);
  if (!k) return refuse(api, "out of memory");
  k->api = api;
  OrtStatus *status = build(k, info);
  if (status) {
    destroy(k);
    k = NULL;
  }
  *out = k;
  return status;
}

static void row_of(const embedding *k, int64_t id, float *y) {
  const flrc_plane *plane = &k->plane;
  const uint8_t *group = plane->data + (size_t)(id / FLRC_ROWS) * flrc_group_bytes(plane);
  int32_t row = (int32_t)(id % FLRC_ROWS);
  if (plane->width == 32) {
    for (int32_t i = 0; i < k->columns; i++) {
      float value;
      memcpy(&value, group + (size_t)FLRC_LINE * (size_t)i + 4 * row, sizeof value);
      y[i] = value * plane->scale * k->factor;
    }
    return;
  }
  for (int32_t b = 0; b < plane->blocks; b++) {
    flrc_block at = flrc_block_at(group, b, plane->width);
    float scale = flrc_scale_of(at.scales[row]) * flrc_factor(plane, 1.0f);
    int32_t begin = FLRC_BLOCK * b, count = k->columns - begin < FLRC_BLOCK ? k->columns - begin : FLRC_BLOCK;
    for (int32_t i = 0; i < count; i++) {
      int32_t u = (int32_t)flrc_integer(at.tile, plane->width, row, i);
      y[begin + i] = (float)(u - flrc_zero(plane->width)) * scale * k->factor;
    }
  }
}

static void some_rows(void *data, size_t index) {
  const run *r = data;
  for (size_t t = TOKENS * index; t < TOKENS * (index + 1) && t < r->tokens; t++)
    row_of(r->k, r->ids[t], r->y + t * (size_t)r->k->columns);
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const embedding *k = kernel;
  const OrtApi *api = k->api;
  tensor ids;
  void *y = NULL;
  OrtStatus *status = input_of(api, context, 0, &ids);
  if (status) return status;
  if (ids.axes != 2 || ids.size[0] != 1) return refuse(api, "Embedding: input_ids must be [1, tokens]");
  run r = {k, ids.data, ids.count, NULL};
  for (size_t t = 0; t < r.tokens; t++)
    if (r.ids[t] < 0 || r.ids[t] >= k->rows) return refuse(api, "Embedding: an id is not one of its rows");
  int64_t size[3] = {1, ids.size[1], k->columns};
  if ((status = output_of(api, context, 0, size, 3, &y))) return status;
  r.y = y;
  return in_parallel(api, context, some_rows, (r.tokens + TOKENS - 1) / TOKENS, &r);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "Embedding"; }
static const char *any_provider(const OrtCustomOp *op) { return (void)op, NULL; }
static int input_type(const OrtCustomOp *op, size_t i) { return (void)op, i ? ORT_UINT8 : ORT_INT64; }
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_FLOAT; }
static size_t two(const OrtCustomOp *op) { return (void)op, 2; }
static size_t one(const OrtCustomOp *op) { return (void)op, 1; }
static int required(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }
static int default_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int first_version(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

const OrtCustomOp flrc_embedding = {
    .version = FLRC_ORT_VERSION,
    .get_name = name,
    .get_execution_provider = any_provider,
    .get_input_type = input_type,
    .get_input_count = two,
    .get_output_type = output_type,
    .get_output_count = one,
    .destroy_kernel = destroy,
    .get_input_characteristic = required,
    .get_output_characteristic = required,
    .get_input_memory = default_memory,
    .create_kernel_2 = create,
    .compute_2 = compute,
    .get_first_version = first_version,
    .get_last_version = any_version,
};
