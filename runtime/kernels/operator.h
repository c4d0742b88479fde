/* What the operators share of reading what onnxruntime gives them: attributes, constants and shapes, or an error. */
#ifndef FLRC_OPERATOR_H
#define FLRC_OPERATOR_H

#include <stdbool.h>
#include <stdlib.h>

#include "flrc_product.h"
#include "ort_api.h"

typedef void ort_release(void *);
#define ORT_RELEASE(api, place) (((ort_release *const *)(const void *)(api))[place])

static inline OrtStatus *refuse(const OrtApi *api, const char *message) {
  return ORT(api, CreateStatus)(ORT_INVALID_ARGUMENT, message);
}

/* Reads an attribute of integers; *out is to be freed. */
static inline OrtStatus *integers_of(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t **out,
                                     size_t *count) {
  OrtStatus *status = ORT(api, KernelInfoGetAttributeArray_int64)(info, name, NULL, count);
  if (status) return status;
  *out = calloc(*count + 1, sizeof **out);
  return *out ? ORT(api, KernelInfoGetAttributeArray_int64)(info, name, *out, count) : refuse(api, "out of memory");
}

/* Reads attributes that may be missing: then *out stays as it is. */
static inline void maybe_float(const OrtApi *api, const OrtKernelInfo *info, const char *name, float *out) {
  float found = 0;
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_float)(info, name, &found);
  if (status) ORT_RELEASE(api, FLRC_ORT_RELEASE_STATUS)(status);
  else *out = found;
}

static inline void maybe_integer(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *out) {
  int64_t found = 0;
  OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, name, &found);
  if (status) ORT_RELEASE(api, FLRC_ORT_RELEASE_STATUS)(status);
  else *out = found;
}

/* A tensor's shape and data; with more than 8 axes, axes is -1. */
typedef struct {
  int64_t axes, size[8];
  size_t count;
  void *data; /* NULL where an optional input is not given */
} tensor;

static inline OrtStatus *tensor_of(const OrtApi *api, const OrtValue *value, tensor *out) {
  tensor none = {0};
  *out = none;
  if (!value) return NULL;
  OrtTensorTypeAndShapeInfo *shape = NULL;
  size_t axes = 0;
  OrtStatus *status = ORT(api, GetTensorTypeAndShape)(value, &shape);
  if (status) return status;
  status = ORT(api, GetDimensionsCount)(shape, &axes);
  out->axes = axes <= 8 ? (int64_t)axes : -1;
  if (!status && axes <= 8) status = ORT(api, GetDimensions)(shape, out->size, axes);
  if (!status) status = ORT(api, GetTensorShapeElementCount)(shape, &out->count);
  ORT_RELEASE(api, FLRC_ORT_RELEASE_SHAPE)(shape);
  return status ? status : ORT(api, GetTensorMutableData)(value, &out->data);
}

static inline OrtStatus *input_of(const OrtApi *api, const OrtKernelContext *context, size_t index, tensor *out) {
  const OrtValue *value = NULL;
  OrtStatus *status = ORT(api, KernelContext_GetInput)(context, index, &value);
  return status ? status : tensor_of(api, value, out);
}

static inline OrtStatus *output_of(const OrtApi *api, OrtKernelContext *context, size_t index, const int64_t *size,
                                   size_t axes, void **data) {
  OrtValue *value = NULL;
  OrtStatus *status = ORT(api, KernelContext_GetOutput)(context, index, size, axes, &value);
  return status ? status : ORT(api, GetTensorMutableData)(value, data);
}

/* Takes a constant of the model, so many numbers of a type. */
static inline OrtStatus *take_constant(const OrtApi *api, const OrtKernelInfo *info, size_t input, int wanted_type,
                                       size_t wanted, const void **out) {
  const OrtValue *value = NULL;
  OrtTensorTypeAndShapeInfo *shape = NULL;
  int constant = 0, type = 0;
  size_t size = 0;
  void *data = NULL;
  OrtStatus *status = ORT(api, KernelInfoGetConstantInput_tensor)(info, input, &constant, &value);
  if (status) return status;
  if (!constant || !value) return refuse(api, "flrc: tiles, norms and biases must be constants of the model");
  if ((status = ORT(api, GetTensorTypeAndShape)(value, &shape))) return status;
  status = ORT(api, GetTensorElementType)(shape, &type);
  if (!status) status = ORT(api, GetTensorShapeElementCount)(shape, &size);
  ORT_RELEASE(api, FLRC_ORT_RELEASE_SHAPE)(shape);
  if (!status) status = ORT(api, GetTensorMutableData)(value, &data);
  if (status) return status;
  if (type != wanted_type) return refuse(api, "flrc: tiles must be uint8, norms and biases float");
  if (size != wanted) return refuse(api, "flrc: a tensor does not have the size that rows, columns and width make");
  *out = data;
  return NULL;
}

/* Takes a plane's tiles, aligned as the kernels read them. */
static inline OrtStatus *take_tiles(const OrtApi *api, const OrtKernelInfo *info, size_t input, size_t wanted,
                                    const uint8_t **out) {
  const void *data = NULL;
  OrtStatus *status = take_constant(api, info, input, ORT_UINT8, wanted, &data);
  if (status) return status;
  if ((uintptr_t)data % FLRC_LINE) return refuse(api, "flrc: tiles must begin at a multiple of 64 bytes");
  *out = data;
  return NULL;
}

/* Does pieces of work on the session's threads, as these come to them; one alone here. */
static inline OrtStatus *in_parallel(const OrtApi *api, const OrtKernelContext *context, void (*work)(void *, size_t),
                                     size_t count, void *data) {
  if (count > 1) return ORT(api, KernelContext_ParallelFor)(context, work, count, count, data);
  if (count) work(data, 0);
  return NULL;
}

#endif
