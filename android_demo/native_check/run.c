/* Feeds given tokens through given stages of a bundle and writes the logits of every one: what the Java engine's
 * Decoder does, over onnxruntime's C API, so that the Android library can run under qemu-aarch64.
 *
 * Usage: run LIBRARY OUT LAYERS KV_HEADS HEAD_DIM VOCAB STAGE.onnx...   (stdin: a line "token stage" each)
 * OUT: float32 [tokens, vocab], native byte order (little endian on both machines). */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_c_api.h"

enum { MAX_TOKENS = 512, MAX_STAGES = 64, NAME = 64 };

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
  if (count < 8 || count - 7 > MAX_STAGES) fail("usage: run LIBRARY OUT LAYERS KV_HEADS HEAD_DIM VOCAB STAGE.onnx...");
  void *library = dlopen(given[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(dlerror());
  const OrtApiBase *(*base)(void) = (const OrtApiBase *(*)(void))dlsym(library, "OrtGetApiBase");
  if (!base || !(api = base()->GetApi(ORT_API_VERSION))) fail("the library is not the onnxruntime of the header");
  int layers = atoi(given[3]), vocab = atoi(given[6]), stages = count - 7, caches = 2 * layers;
  int64_t heads = atoi(given[4]), width = atoi(given[5]);

  int64_t tokens[MAX_TOKENS];
  int stage_of[MAX_TOKENS], total = 0;
  long long token;
  for (int stage; total < MAX_TOKENS && scanf("%lld %d", &token, &stage) == 2; total++) {
    if (stage < 0 || stage >= stages) fail("a stage is outside the bundle");
    tokens[total] = token;
    stage_of[total] = stage;
  }
  if (!total) fail("no tokens");

  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *sessions[MAX_STAGES];
  OrtMemoryInfo *memory;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "check", &env));
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, 1));
  for (int i = 0; i < stages; i++) check(api->CreateSession(env, given[7 + i], options, &sessions[i]));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

  /* One buffer is past and present of every stage, as in the runtimes. */
  int inputs = caches + 2, outputs = caches + 1;
  const char **in_names = calloc(inputs, sizeof *in_names), **out_names = calloc(outputs, sizeof *out_names);
  OrtValue **in = calloc(inputs, sizeof *in), **out = calloc(outputs, sizeof *out);
  int64_t shape[4] = {1, heads, total, width};
  size_t bytes = 4 * (size_t)(heads * total * width);
  for (int i = 0; i < caches; i++) {
    char *past = malloc(NAME), *present = malloc(NAME);
    const char *kind = i % 2 ? "value" : "key";
    snprintf(past, NAME, "past_key_values.%d.%s", i / 2, kind);
    snprintf(present, NAME, "present.%d.%s", i / 2, kind);
    in_names[i + 2] = past;
    out_names[i + 1] = present;
    check(api->CreateTensorWithDataAsOrtValue(memory, calloc(1, bytes), bytes, shape, 4,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &in[i + 2]));
    out[i + 1] = in[i + 2];
  }
  int64_t ones[MAX_TOKENS], one_row[2] = {1, 1}, logits_shape[3] = {1, 1, vocab};
  for (int i = 0; i < total; i++) ones[i] = 1;
  float *logits = calloc(vocab, sizeof *logits);
  in_names[0] = "input_ids";
  in_names[1] = "attention_mask";
  out_names[0] = "logits";
  check(api->CreateTensorWithDataAsOrtValue(memory, logits, 4 * (size_t)vocab, logits_shape, 3,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &out[0]));
  FILE *file = fopen(given[2], "wb");
  if (!file) fail("the output cannot be written");
  for (int i = 0; i < total; i++) {
    int64_t mask_row[2] = {1, i + 1};
    check(api->CreateTensorWithDataAsOrtValue(memory, &tokens[i], sizeof *tokens, one_row, 2,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &in[0]));
    check(api->CreateTensorWithDataAsOrtValue(memory, ones, (i + 1) * sizeof *ones, mask_row, 2,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &in[1]));
    check(api->Run(sessions[stage_of[i]], NULL, in_names, (const OrtValue *const *)in, inputs, out_names, outputs, out));
    fwrite(logits, sizeof *logits, vocab, file);
    api->ReleaseValue(in[0]);
    api->ReleaseValue(in[1]);
  }
  if (fclose(file)) fail("the output cannot be written");
  printf("%s\n", base()->GetVersionString());
  fflush(stdout);
  _Exit(0); /* bionic's libraries do not end well in glibc's exit */
}
