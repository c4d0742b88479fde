/* The few parts of onnxruntime's C interface that the operators use, by their places in its table.
 *
 * The table is append-only, so an entry's place and signature hold in every later version; a test compares them with the real
 * header. Nothing here is linked against onnxruntime.
 */
#ifndef FLRC_ORT_API_H
#define FLRC_ORT_API_H

#include <stddef.h>
#include <stdint.h>

#define FLRC_ORT_VERSION 17 /* the first with all of these */

typedef struct OrtApi OrtApi;
typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;

typedef struct {
  const OrtApi *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} OrtApiBase;

enum { ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT64 = 7 }; /* ONNXTensorElementDataType */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1, ORT_VARIADIC = 2 };

/* name, place in the table, signature */
#define FLRC_ORT_ENTRIES(entry)                                                                                              \
  entry(CreateStatus, 0, (int code, const char *message))                                                                    \
  entry(CreateCustomOpDomain, 26, (const char *name, OrtCustomOpDomain **out))                                               \
  entry(CustomOpDomain_Add, 27, (OrtCustomOpDomain *domain, const void *op))                                                 \
  entry(AddCustomOpDomain, 28, (OrtSessionOptions *options, OrtCustomOpDomain *domain))                                      \
  entry(GetTensorMutableData, 51, (const OrtValue *value, void **out))                                                       \
  entry(GetTensorElementType, 60, (const OrtTensorTypeAndShapeInfo *info, int *out))                                         \
  entry(GetDimensionsCount, 61, (const OrtTensorTypeAndShapeInfo *info, size_t *out))                                        \
  entry(GetDimensions, 62, (const OrtTensorTypeAndShapeInfo *info, int64_t *out, size_t count))                              \
  entry(GetTensorShapeElementCount, 64, (const OrtTensorTypeAndShapeInfo *info, size_t *out))                                \
  entry(GetTensorTypeAndShape, 65, (const OrtValue *value, OrtTensorTypeAndShapeInfo **out))                                 \
  entry(KernelInfoGetAttribute_float, 85, (const OrtKernelInfo *info, const char *name, float *out))                         \
  entry(KernelInfoGetAttribute_int64, 86, (const OrtKernelInfo *info, const char *name, int64_t *out))                       \
  entry(KernelInfoGetAttribute_string, 87, (const OrtKernelInfo *info, const char *name, char *out, size_t *size))           \
  entry(KernelContext_GetInput, 90, (const OrtKernelContext *context, size_t index, const OrtValue **out))                   \
  entry(KernelContext_GetOutput, 91,                                                                                         \
        (OrtKernelContext *context, size_t index, const int64_t *dimensions, size_t count, OrtValue **out))                  \
  entry(KernelInfoGetAttributeArray_float, 162, (const OrtKernelInfo *info, const char *name, float *out, size_t *size))     \
  entry(KernelInfoGetAttributeArray_int64, 163, (const OrtKernelInfo *info, const char *name, int64_t *out, size_t *size))   \
  entry(KernelInfo_GetInputCount, 230, (const OrtKernelInfo *info, size_t *out))                                             \
  entry(KernelInfo_GetOutputCount, 231, (const OrtKernelInfo *info, size_t *out))                                            \
  entry(KernelInfo_GetInputName, 232, (const OrtKernelInfo *info, size_t index, char *out, size_t *size))                    \
  entry(KernelInfoGetConstantInput_tensor, 249,                                                                              \
        (const OrtKernelInfo *info, size_t index, int *is_constant, const OrtValue **out))                                   \
  entry(KernelContext_ParallelFor, 274,                                                                                      \
        (const OrtKernelContext *context, void (*work)(void *, size_t), size_t total, size_t batches, void *data))

#define FLRC_ORT_TYPE(name, place, signature) typedef OrtStatus *(*ort_##name) signature;
FLRC_ORT_ENTRIES(FLRC_ORT_TYPE)
#undef FLRC_ORT_TYPE

/* ORT(api, GetDimensionsCount)(info, &count) */
#define FLRC_ORT_PLACE(name, place, signature) ORT_PLACE_##name = place,
enum { FLRC_ORT_ENTRIES(FLRC_ORT_PLACE) };
#undef FLRC_ORT_PLACE
#define ORT(api, name) (((const ort_##name *)(const void *)(api))[ORT_PLACE_##name])
/* They return nothing: ReleaseStatus, ReleaseTensorTypeAndShapeInfo. */
#define FLRC_ORT_RELEASE_STATUS 93
#define FLRC_ORT_RELEASE_SHAPE 99

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
  uint32_t version;
  void *(*create_kernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
  const char *(*get_name)(const OrtCustomOp *op);
  const char *(*get_execution_provider)(const OrtCustomOp *op);
  int (*get_input_type)(const OrtCustomOp *op, size_t index);
  size_t (*get_input_count)(const OrtCustomOp *op);
  int (*get_output_type)(const OrtCustomOp *op, size_t index);
  size_t (*get_output_count)(const OrtCustomOp *op);
  void (*compute)(void *kernel, OrtKernelContext *context);
  void (*destroy_kernel)(void *kernel);
  int (*get_input_characteristic)(const OrtCustomOp *op, size_t index);
  int (*get_output_characteristic)(const OrtCustomOp *op, size_t index);
  int (*get_input_memory)(const OrtCustomOp *op, size_t index);
  int (*get_variadic_input_least)(const OrtCustomOp *op);
  int (*get_variadic_input_alike)(const OrtCustomOp *op);
  int (*get_variadic_output_least)(const OrtCustomOp *op);
  int (*get_variadic_output_alike)(const OrtCustomOp *op);
  OrtStatus *(*create_kernel_2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
  OrtStatus *(*compute_2)(void *kernel, OrtKernelContext *context);
  OrtStatus *(*infer_shape)(const OrtCustomOp *op, void *context);
  int (*get_first_version)(const OrtCustomOp *op);
  int (*get_last_version)(const OrtCustomOp *op);
  size_t (*get_may_inplace)(int **inputs, int **outputs);
  void (*release_may_inplace)(int *inputs, int *outputs);
  size_t (*get_alias)(int **inputs, int **outputs);
  void (*release_alias)(int *inputs, int *outputs);
};

#endif
