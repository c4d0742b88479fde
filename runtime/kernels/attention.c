/* The operator flrc.Attention: (norms and) rotation of queries and keys, the cache, grouped queries, windows, soft caps.
 *
 * Inputs: q float [1, S, num_heads * head_dim], k and v [1, S, kv_num_heads * head_dim]; past_key and past_value uint8
 * [1, kv_num_heads, blocks, bytes] (flrc_attention.h); attention_mask int64 [1, total], of which only the length is read;
 * optional: cos and sin float [positions, width], q_norm and k_norm float [head_dim].
 * Outputs: y like q; present_key and present_value like past, with blocks for all positions. They may be the same memory.
 * Attributes: num_heads, kv_num_heads, head_dim, scale, cache ("float32", "float16" or "int8"); window (0: all; else a query
 * sees itself and so many less one before it), softcap (0: none), epsilon of the norms.
 */
#include <math.h>
#include <string.h>

#include "operator.h"

#define MOST_POSITIONS (1 << 24)
#define FEW_TILES 16 /* below it, chunks are spread over threads as well */
#define WAVE 64      /* chunks, of all tiles, whose sums are kept apart at a time */

typedef struct {
  const OrtApi *api;
  const flrc_attention_isa *isa;
  flrc_attention fixed; /* what the attributes say */
} attention;

typedef struct {
  const attention *k;
  flrc_attention a;
  int32_t heads_at_once, tokens_at_once; /* of a tile */
  int32_t parts, tiles;                  /* tiles of a group of heads; all */
  int32_t wide, chunk, chunks;           /* of a wave: the first, and how many */
  bool last;
  float *memory; /* [tiles][1 + chunks] of partial sums */
  const uint8_t *past_keys, *past_values;
  size_t past_bytes, kept_bytes; /* of a head */
} run;

static void destroy(void *kernel) { free(kernel); }

static OrtStatus *build(attention *k, const OrtKernelInfo *info) {
  const OrtApi *api = k->api;
  flrc_attention *a = &k->fixed;
  int64_t heads = 0, kv_heads = 0, dim = 0, window = 0;
  char cache[16] = {0};
  size_t length = 0;
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, "num_heads", &heads);
  if (!status) status = ORT(api, KernelInfoGetAttribute_int64)(info, "kv_num_heads", &kv_heads);
  if (!status) status = ORT(api, KernelInfoGetAttribute_int64)(info, "head_dim", &dim);
  if (!status) status = ORT(api, KernelInfoGetAttribute_float)(info, "scale", &a->scale);
  if (!status) status = ORT(api, KernelInfoGetAttribute_string)(info, "cache", NULL, &length);
  if (!status && length <= sizeof cache) status = ORT(api, KernelInfoGetAttribute_string)(info, "cache", cache, &length);
  if (status) return status;
  maybe_integer(api, info, "window", &window);
  maybe_float(api, info, "softcap", &a->softcap);
  maybe_float(api, info, "epsilon", &a->epsilon);
  if (heads < 1 || heads > 4096 || kv_heads < 1 || kv_heads > heads || heads % kv_heads)
    return refuse(api, "Attention: num_heads must be 1 to 4096 and a multiple of kv_num_heads");
  if (dim < 8 || dim > FLRC_MOST_DIM || dim % 8) return refuse(api, "Attention: head_dim must be a multiple of 8, 8 to 512");
  if (window < 0 || window > 1 << 30) return refuse(api, "Attention: window must be 0 to 2^30");
  if (!isfinite(a->scale)) return refuse(api, "Attention: scale must be finite");
  if (!(a->softcap >= 0 && isfinite(a->softcap))) return refuse(api, "Attention: softcap must be 0 or positive");
  if (!(a->epsilon >= 0 && isfinite(a->epsilon))) return refuse(api, "Attention: epsilon must be 0 or positive");
  if (strcmp(cache, "float32") == 0) a->cache = FLRC_CACHE_FLOAT;
  else if (strcmp(cache, "float16") == 0) a->cache = FLRC_CACHE_HALF;
  else if (strcmp(cache, "int8") == 0) a->cache = FLRC_CACHE_INT8;
  else return refuse(api, "Attention: cache must be float32, float16 or int8");
  a->heads = (int32_t)heads;
  a->kv_heads = (int32_t)kv_heads;
  a->dim = (int32_t)dim;
  a->window = (int32_t)window;
  int64_t size = a->cache == FLRC_CACHE_FLOAT ? 4 : a->cache == FLRC_CACHE_HALF ? 2 : 1;
  a->block_bytes = FLRC_LANES_OF_BLOCK * (dim * size + (a->cache == FLRC_CACHE_INT8 ? 4 : 0));
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  attention *k = calloc(1, sizeof *k);
  if (!k) return refuse(api, "out of memory");
  k->api = api;
  const flrc_isa *isa = flrc_best_isa();
  if (isa) k->isa = isa->attention;
  OrtStatus *status = isa ? build(k, info) : refuse(api, "FLRC_EDGE_ISA names no instruction set of this machine");
  if (status) {
    destroy(k);
    k = NULL;
  }
  *out = k;
  return status;
}

/* The index-th tile; the last tokens, which see most, come first. */
static flrc_tile tile_of(const run *r, size_t index) {
  const flrc_attention *a = &r->a;
  int32_t i = (int32_t)index, group = a->heads / a->kv_heads, columns = a->kv_heads * r->parts;
  int32_t part = i % columns % r->parts, kv_head = i % columns / r->parts;
  int32_t token = (r->tiles / columns - 1 - i / columns) * r->tokens_at_once, head = part * r->heads_at_once;
  flrc_tile tile = {kv_head * group + head, group - head < r->heads_at_once ? group - head : r->heads_at_once, token,
                    a->tokens - token < r->tokens_at_once ? a->tokens - token : r->tokens_at_once};
  return tile;
}

/* The chunks that a tile's queries see. */
static void chunks_of(const flrc_attention *a, const flrc_tile *tile, int32_t *first, int32_t *last) {
  int32_t position = a->past + tile->token;
  *first = (a->window > 0 && position >= a->window ? position + 1 - a->window : 0) / FLRC_CHUNK;
  *last = (position + tile->tokens - 1) / FLRC_CHUNK + 1;
}

static void attend(void *data, size_t index) {
  const run *r = data;
  flrc_tile tile = tile_of(r, index);
  int32_t first, last;
  chunks_of(&r->a, &tile, &first, &last);
  r->k->isa->attend(&r->a, &tile, first, last, NULL);
}

static float *partials_of(const run *r, size_t tile) {
  size_t floats = flrc_partial_floats(r->heads_at_once * r->tokens_at_once, r->wide);
  return r->memory + tile * floats * (1 + WAVE / (size_t)r->tiles);
}

/* One chunk of one tile. */
static void attend_apart(void *data, size_t index) {
  const run *r = data;
  size_t of = index / (size_t)r->chunks;
  int32_t chunk = (int32_t)(index % (size_t)r->chunks);
  flrc_tile tile = tile_of(r, of);
  float *at = partials_of(r, of) + flrc_partial_floats(tile.heads * tile.tokens, r->wide) * (size_t)(1 + chunk);
  r->k->isa->attend(&r->a, &tile, r->chunk + chunk, r->chunk + chunk + 1, at);
}

static void put_together(void *data, size_t index) {
  const run *r = data;
  flrc_tile tile = tile_of(r, index);
  int32_t rows = tile.heads * tile.tokens;
  float *at = partials_of(r, index);
  flrc_partial all = flrc_partial_at(at, rows, r->wide, 0);
  r->k->isa->together(&r->a, &tile, all, at + flrc_partial_floats(rows, r->wide), r->chunks, r->last);
}

/* Few tiles and many positions: chunks by themselves, then these in order, so many at a time. */
static OrtStatus *in_waves(const OrtKernelContext *context, run *r) {
  const OrtApi *api = r->k->api;
  int32_t first = INT32_MAX, last = 0;
  for (int32_t i = 0; i < r->tiles; i++) {
    flrc_tile tile = tile_of(r, (size_t)i);
    int32_t from, to;
    chunks_of(&r->a, &tile, &from, &to);
    first = from < first ? from : first;
    last = to > last ? to : last;
  }
  size_t tiles = (size_t)r->tiles, each = flrc_partial_floats(r->heads_at_once * r->tokens_at_once, r->wide);
  r->memory = malloc(tiles * each * (1 + WAVE / tiles) * sizeof(float));
  if (!r->memory) return refuse(api, "out of memory");
  for (size_t i = 0; i < tiles; i++) memset(partials_of(r, i), 0, 2 * FLRC_MOST_ROWS * sizeof(float));
  OrtStatus *status = NULL;
  int32_t step = WAVE / r->tiles;
  for (r->chunk = first; !status && r->chunk < last; r->chunk += step) {
    r->chunks = last - r->chunk < step ? last - r->chunk : step;
    r->last = r->chunk + step >= last;
    status = in_parallel(api, context, attend_apart, tiles * (size_t)r->chunks, r);
    if (!status) status = in_parallel(api, context, put_together, tiles, r);
  }
  free(r->memory);
  return status;
}

/* The keys and values of one head and those tokens that fall into one block. */
static void append(void *data, size_t index) {
  const run *r = data;
  const flrc_attention *a = &r->a;
  int32_t kv_head = (int32_t)(index % (size_t)a->kv_heads), block = (int32_t)(index / (size_t)a->kv_heads);
  int32_t first = (a->past / FLRC_LANES_OF_BLOCK + block) * FLRC_LANES_OF_BLOCK - a->past;
  int32_t last = first + FLRC_LANES_OF_BLOCK;
  r->k->isa->append(a, kv_head, first > 0 ? first : 0, last < a->tokens ? last : a->tokens);
}

/* A head's past, and zeros behind it. */
static void copy(void *data, size_t index) {
  const run *r = data;
  size_t head = index / 2, bytes = (size_t)r->a.head_bytes;
  uint8_t *to = (index % 2 ? r->a.values : r->a.keys) + head * bytes;
  memcpy(to, (index % 2 ? r->past_values : r->past_keys) + head * r->past_bytes, r->kept_bytes);
  memset(to + r->kept_bytes, 0, bytes - r->kept_bytes);
}

static bool is_shape(const tensor *t, int64_t axes, int64_t a, int64_t b, int64_t c, int64_t d) {
  int64_t wanted[4] = {a, b, c, d};
  if (t->axes != axes) return false;
  for (int64_t i = 0; i < axes; i++)
    if (wanted[i] >= 0 && t->size[i] != wanted[i]) return false;
  return true;
}

enum { Q, K, V, PAST_KEY, PAST_VALUE, MASK, COS, SIN, Q_NORM, K_NORM, INPUTS };

/* Fills a run from what came in; *blocks are those of past. */
static OrtStatus *take_inputs(const OrtApi *api, const OrtKernelContext *context, run *r, int64_t *blocks) {
  flrc_attention *a = &r->a;
  tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) {
    OrtStatus *status = input_of(api, context, i, in + i);
    if (status) return status;
  }
  int64_t tokens = in[Q].axes == 3 ? in[Q].size[1] : -1, total = in[MASK].axes == 2 ? in[MASK].size[1] : -1;
  int64_t own = a->kv_heads * a->dim;
  if (!is_shape(in + Q, 3, 1, -1, a->heads * a->dim, 0)) return refuse(api, "Attention: q must be [1, tokens, num_heads * head_dim]");
  if (!is_shape(in + K, 3, 1, tokens, own, 0) || !is_shape(in + V, 3, 1, tokens, own, 0))
    return refuse(api, "Attention: k and v must be [1, tokens, kv_num_heads * head_dim]");
  if (!is_shape(in + MASK, 2, 1, -1, 0, 0) || total < tokens || total > MOST_POSITIONS)
    return refuse(api, "Attention: attention_mask must be [1, past + tokens], up to 2^24");
  if (!is_shape(in + PAST_KEY, 4, 1, a->kv_heads, -1, a->block_bytes) ||
      !is_shape(in + PAST_VALUE, 4, 1, a->kv_heads, in[PAST_KEY].size[2], a->block_bytes))
    return refuse(api, "Attention: past must be [1, kv_num_heads, blocks, bytes of 16 positions]");
  *blocks = in[PAST_KEY].size[2];
  if (*blocks > MOST_POSITIONS / FLRC_LANES_OF_BLOCK) return refuse(api, "Attention: past has too many blocks");
  if (*blocks * FLRC_LANES_OF_BLOCK < total - tokens)
    return refuse(api, "Attention: past has fewer positions than attention_mask says");
  if (!in[COS].data != !in[SIN].data) return refuse(api, "Attention: cos and sin come together");
  if (in[COS].data) {
    int64_t width = in[COS].size[1];
    if (!is_shape(in + COS, 2, -1, -1, 0, 0) || !is_shape(in + SIN, 2, in[COS].size[0], width, 0, 0) || width < 1 ||
        2 * width > a->dim)
      return refuse(api, "Attention: cos and sin must be [positions, up to head_dim / 2]");
    if (in[COS].size[0] < total) return refuse(api, "Attention: cos and sin have fewer positions than attention_mask says");
    a->rotated = (int32_t)width;
  }
  for (int i = Q_NORM; i <= K_NORM; i++)
    if (in[i].data && !is_shape(in + i, 1, a->dim, 0, 0, 0)) return refuse(api, "Attention: norms must be [head_dim]");
  a->tokens = (int32_t)tokens;
  a->past = (int32_t)(total - tokens);
  a->q = in[Q].data;
  a->k = in[K].data;
  a->v = in[V].data;
  a->cos = in[COS].data;
  a->sin = in[SIN].data;
  a->q_norm = in[Q_NORM].data;
  a->k_norm = in[K_NORM].data;
  r->past_keys = in[PAST_KEY].data;
  r->past_values = in[PAST_VALUE].data;
  r->past_bytes = (size_t)(*blocks * a->block_bytes);
  return NULL;
}

/* Whether `present` is past's memory: 1, another: 0, or partly: -1. */
static int same(const uint8_t *past, size_t past_bytes, const uint8_t *present, size_t bytes) {
  if (past == present && past_bytes == bytes) return 1;
  uintptr_t p = (uintptr_t)past, q = (uintptr_t)present;
  return p < q + bytes && q < p + past_bytes ? -1 : 0;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const attention *k = kernel;
  const OrtApi *api = k->api;
  run r = {.k = k, .a = k->fixed};
  flrc_attention *a = &r.a;
  int64_t blocks = 0;
  void *out[3] = {NULL};
  OrtStatus *status = take_inputs(api, context, &r, &blocks);
  if (status) return status;
  int64_t total = (int64_t)a->past + a->tokens, needed = (total + FLRC_LANES_OF_BLOCK - 1) / FLRC_LANES_OF_BLOCK;
  if (needed < blocks) needed = blocks;
  int64_t of_y[3] = {1, a->tokens, a->heads * a->dim}, of_cache[4] = {1, a->kv_heads, needed, a->block_bytes};
  status = output_of(api, context, 0, of_y, 3, out);
  for (size_t i = 1; !status && i < 3; i++) status = output_of(api, context, i, of_cache, 4, out + i);
  if (status) return status;
  a->y = out[0];
  a->keys = out[1];
  a->values = out[2];
  a->head_bytes = needed * a->block_bytes;
  r.kept_bytes = (size_t)((a->past + FLRC_LANES_OF_BLOCK - 1) / FLRC_LANES_OF_BLOCK * a->block_bytes);

  size_t heads = (size_t)a->kv_heads, bytes = heads * (size_t)a->head_bytes, before = heads * r.past_bytes;
  int shared = same(r.past_keys, before, a->keys, bytes);
  if (((uintptr_t)a->keys | (uintptr_t)a->values) % 4) return refuse(api, "Attention: present must begin at a multiple of 4");
  if (shared < 0 || same(r.past_values, before, a->values, bytes) != shared)
    return refuse(api, "Attention: past and present must be the same memory, or have none in common");
  if (!shared && bytes) status = in_parallel(api, context, copy, 2 * heads, &r);
  if (status || !a->tokens) return status;

  int32_t written = (int32_t)((total - 1) / FLRC_LANES_OF_BLOCK) - a->past / FLRC_LANES_OF_BLOCK + 1;
  size_t appends = heads * (size_t)written;
  if (a->tokens > 1) status = in_parallel(api, context, append, appends, &r);
  else for (size_t i = 0; i < appends; i++) append(&r, i);
  if (status) return status;

  int32_t group = a->heads / a->kv_heads;
  r.wide = (a->dim + 15) / 16 * 16;
  int32_t most = FLRC_TILE_FLOATS / r.wide < FLRC_MOST_ROWS ? FLRC_TILE_FLOATS / r.wide : FLRC_MOST_ROWS;
  r.parts = (group + most - 1) / most;
  r.heads_at_once = (group + r.parts - 1) / r.parts;
  r.parts = (group + r.heads_at_once - 1) / r.heads_at_once; /* none is empty */
  r.tokens_at_once = most / r.heads_at_once < a->tokens ? most / r.heads_at_once : a->tokens;
  int64_t tiles = (int64_t)a->kv_heads * r.parts * ((a->tokens + r.tokens_at_once - 1) / r.tokens_at_once);
  if (tiles > INT32_MAX) return refuse(api, "Attention: there are too many queries");
  r.tiles = (int32_t)tiles;
  if (r.tiles < FEW_TILES && total > FLRC_CHUNK) return in_waves(context, &r);
  return in_parallel(api, context, attend, (size_t)r.tiles, &r);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "Attention"; }
static const char *any_provider(const OrtCustomOp *op) { return (void)op, NULL; }
static int input_type(const OrtCustomOp *op, size_t i) {
  return (void)op, i == PAST_KEY || i == PAST_VALUE ? ORT_UINT8 : i == MASK ? ORT_INT64 : ORT_FLOAT;
}
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, i ? ORT_UINT8 : ORT_FLOAT; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 3; }
static int input_characteristic(const OrtCustomOp *op, size_t i) { return (void)op, i < COS ? ORT_REQUIRED : ORT_OPTIONAL; }
static int output_characteristic(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }
static int default_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int first_version(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

const OrtCustomOp flrc_attention_op = {
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
    .create_kernel_2 = create,
    .compute_2 = compute,
    .get_first_version = first_version,
    .get_last_version = any_version,
};
