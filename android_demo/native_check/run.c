/* Feeds given tokens through given stages of a bundle and writes the logits of every one: what the Java engine's
 * Decoder does, over onnxruntime's C API, so that the Android library can run under qemu-aarch64.
 *
 * Usage: run LIBRARY KERNELS OUT LAYERS KV_HEADS WIDTH POSITIONS VOCAB PROMPT STAGE.onnx...
 * KERNELS: the operator library, - without one. WIDTH, POSITIONS: of a row of the cache: floats of one position, or bytes of
 * several. PROMPT: tokens that are fed at once, to the stage of the first. stdin: a line "token stage" each.
 * OUT: float32 [tokens, vocab], native byte order (little endian on both machines). */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_c_api.h"

enum { MAX_TOKENS = 512, MAX_STAGES = 64, NAME = 64, FIRST_STAGE = 10 };

/* Bionic keeps its stack guard at TP + 0x28, which glibc gives to the program's first thread-local block on aarch64. */
__thread char guard_slot[256] __attribute__((aligned(64))) = {1};

static const OrtApi *api;

/* dprintf: the shim looks up fprintf's successor, which makes dlerror's text void. */

static void check(OrtStatus *status) {
  if (status) {
    dprintf(2, "%s\n", api->GetErrorMessage(status));
    _Exit(1);
  }
}

static void fail(const char *message) {
  dprintf(2, "%s\n", message);
  _Exit(1);
}

int main(int count, char **given) {
  guard_slot[128] = 7;
  if (count <= FIRST_STAGE || count - FIRST_STAGE > MAX_STAGES)
    fail("usage: run LIBRARY KERNELS OUT LAYERS KV_HEADS WIDTH POSITIONS VOCAB PROMPT STAGE.onnx...");
  void *library = dlopen(given[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(dlerror());
  const OrtApiBase *(*base)(void) = (const OrtApiBase *(*)(void))dlsym(library, "OrtGetApiBase");
  if (!base || !(api = base()->GetApi(ORT_API_VERSION))) fail("the library is not the onnxruntime of the header");
  int layers = atoi(given[4]), vocab = atoi(given[8]), prompt = atoi(given[9]), stages = count - FIRST_STAGE;
  int64_t heads = atoi(given[5]), width = atoi(given[6]), positions = atoi(given[7]);
  int caches = 2 * layers, floats = positions == 1;

  int64_t tokens[MAX_TOKENS];
  int stage_of[MAX_TOKENS], total = 0;
  long long token;
  for (int stage; total < MAX_TOKENS && scanf("%lld %d", &token, &stage) == 2; total++) {
    if (stage < 0 || stage >= stages) fail("a stage is outside the bundle");
    tokens[total] = token;
    stage_of[total] = stage;
  }
  if (prompt < 1 || total < prompt) fail("too few tokens");

  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *sessions[MAX_STAGES];
  OrtMemoryInfo *memory;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "check", &env));
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, 1));
  if (strcmp(given[2], "-")) check(api->RegisterCustomOpsLibrary_V2(options, given[2]));
  for (int i = 0; i < stages; i++) check(api->CreateSession(env, given[FIRST_STAGE + i], options, &sessions[i]));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

  /* One buffer is past and present of every stage, as in the runtimes. */
  int inputs = caches + 2 + !floats, outputs = caches + 1; /* our own operators' graphs take logits_start, too */
  const char **in_names = calloc(inputs, sizeof *in_names), **out_names = calloc(outputs, sizeof *out_names);
  OrtValue **in = calloc(inputs, sizeof *in), **out = calloc(outputs, sizeof *out);
  int64_t shape[4] = {1, heads, (total + positions - 1) / positions, width};
  size_t bytes = (floats ? sizeof(float) : 1) * (size_t)(heads * shape[2] * width);
  ONNXTensorElementDataType type = floats ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  for (int i = 0; i < caches; i++) {
    char *past = malloc(NAME), *present = malloc(NAME);
    const char *kind = i % 2 ? "value" : "key";
    snprintf(past, NAME, "past_key_values.%d.%s", i / 2, kind);
    snprintf(present, NAME, "present.%d.%s", i / 2, kind);
    in_names[i + 2] = past;
    out_names[i + 1] = present;
    check(api->CreateTensorWithDataAsOrtValue(memory, calloc(1, bytes), bytes, shape, 4, type, &in[i + 2]));
    out[i + 1] = in[i + 2];
  }
  int64_t ones[MAX_TOKENS], start = 0, one = 1;
  if (!floats) {
    in_names[inputs - 1] = "logits_start";
    check(api->CreateTensorWithDataAsOrtValue(memory, &start, sizeof start, &one, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
                                              &in[inputs - 1]));
  }
  for (int i = 0; i < total; i++) ones[i] = 1;
  float *logits = calloc((size_t)prompt * vocab, sizeof *logits);
  in_names[0] = "input_ids";
  in_names[1] = "attention_mask";
  out_names[0] = "logits";
  FILE *file = fopen(given[3], "wb");
  if (!file) fail("the output cannot be written");
  for (int i = 0, fed = prompt; i < total; i += fed, fed = 1) {
    int64_t row[2] = {1, fed}, mask_row[2] = {1, i + fed}, logits_shape[3] = {1, fed, vocab};
    size_t found = (size_t)fed * vocab;
    check(api->CreateTensorWithDataAsOrtValue(memory, &tokens[i], fed * sizeof *tokens, row, 2,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &in[0]));
    check(api->CreateTensorWithDataAsOrtValue(memory, ones, (i + fed) * sizeof *ones, mask_row, 2,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &in[1]));
    check(api->CreateTensorWithDataAsOrtValue(memory, logits, found * sizeof *logits, logits_shape, 3,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &out[0]));
    check(api->Run(sessions[stage_of[i]], NULL, in_names, (const OrtValue *const *)in, inputs, out_names, outputs, out));
    fwrite(logits, sizeof *logits, found, file);
    api->ReleaseValue(in[0]);
    api->ReleaseValue(in[1]);
    api->ReleaseValue(out[0]);
  }
  if (fclose(file)) fail("the output cannot be written");
  printf("%s\n", base()->GetVersionString());
  fflush(stdout);
  _Exit(0); /* bionic's libraries do not end well in glibc's exit */
}
