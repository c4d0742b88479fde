/* Registers the operator library (runtime/kernels) with the Android onnxruntime under qemu, and perhaps runs a graph of one
 * float input through it.
 *
 * Usage: operators LIBRARY KERNELS [GRAPH OUT DIMENSION...]   (stdin: the input's float32)
 * stdout: the instruction set in use and the library's version. OUT: the bytes of all outputs, one behind another. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "onnxruntime_c_api.h"

enum { MAX_OUTPUTS = 64, MAX_AXES = 8 };

/* As in run.c: bionic's stack guard. */
__thread char guard_slot[256] __attribute__((aligned(64))) = {1};

static const OrtApi *api;

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

static void run(OrtSession *session, OrtAllocator *allocator, const char *path, int axes, char **dimensions) {
  int64_t shape[MAX_AXES];
  size_t count = 1, outputs = 0;
  for (int i = 0; i < axes; i++) count *= (size_t)(shape[i] = atoi(dimensions[i]));
  float *x = calloc(count, sizeof *x);
  if (fread(x, sizeof *x, count, stdin) != count) fail("the input is too short");
  OrtMemoryInfo *memory;
  OrtValue *in, *out[MAX_OUTPUTS] = {NULL};
  char *in_name, *out_names[MAX_OUTPUTS];
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(api->CreateTensorWithDataAsOrtValue(memory, x, count * sizeof *x, shape, (size_t)axes,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &in));
  check(api->SessionGetInputName(session, 0, allocator, &in_name));
  check(api->SessionGetOutputCount(session, &outputs));
  if (outputs > MAX_OUTPUTS) fail("too many outputs");
  for (size_t i = 0; i < outputs; i++) check(api->SessionGetOutputName(session, i, allocator, &out_names[i]));
  check(api->Run(session, NULL, (const char *const *)&in_name, (const OrtValue *const *)&in, 1,
                 (const char *const *)out_names, outputs, out));
  FILE *file = fopen(path, "wb");
  if (!file) fail("the output cannot be written");
  for (size_t i = 0; i < outputs; i++) {
    OrtTensorTypeAndShapeInfo *info;
    size_t elements = 0;
    void *data;
    check(api->GetTensorTypeAndShape(out[i], &info));
    check(api->GetTensorShapeElementCount(info, &elements));
    check(api->GetTensorMutableData(out[i], &data));
    fwrite(data, sizeof(float), elements, file);
  }
  if (fclose(file)) fail("the output cannot be written");
}

int main(int count, char **given) {
  guard_slot[128] = 7;
  if (count != 3 && (count < 6 || count > 5 + MAX_AXES)) fail("usage: operators LIBRARY KERNELS [GRAPH OUT DIMENSION...]");
  void *library = dlopen(given[1], RTLD_NOW | RTLD_LOCAL), *kernels = dlopen(given[2], RTLD_NOW | RTLD_LOCAL);
  if (!library || !kernels) fail(dlerror());
  const OrtApiBase *(*base)(void) = (const OrtApiBase *(*)(void))dlsym(library, "OrtGetApiBase");
  int (*version)(void) = (int (*)(void))dlsym(kernels, "flrc_kernels_version");
  const char *(*isa)(void) = (const char *(*)(void))dlsym(kernels, "flrc_kernels_isa");
  OrtStatus *(*enter)(OrtSessionOptions *, const OrtApiBase *) =
      (OrtStatus * (*)(OrtSessionOptions *, const OrtApiBase *)) dlsym(kernels, "RegisterCustomOps");
  if (!base || !(api = base()->GetApi(ORT_API_VERSION))) fail("the library is not the onnxruntime of the header");
  if (!version || !isa || !enter) fail("the operator library lacks a function");
  if (!isa()) fail("FLRC_EDGE_ISA names no instruction set of this processor");
  OrtEnv *env;
  OrtSessionOptions *options;
  OrtAllocator *allocator;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "check", &env));
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, 1));
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  check(api->RegisterCustomOpsLibrary_V2(options, given[2]));
  if (count > 3) {
    OrtSession *session;
    check(api->CreateSession(env, given[3], options, &session));
    run(session, allocator, given[4], count - 5, given + 5);
  }
  printf("%s %d\n", isa(), version());
  fflush(stdout);
  _Exit(0); /* bionic's libraries do not end well in glibc's exit */
}
