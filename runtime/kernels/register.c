/* What is called from outside: by onnxruntime, when the library is named as one of custom operators (the domain flrc), and by
 * those who look for the library. */
#include "flrc_product.h"
#include "ort_api.h"

#if defined(_WIN32)
#define FLRC_EXPORT __declspec(dllexport)
#else
#define FLRC_EXPORT __attribute__((visibility("default")))
#endif

#define FLRC_KERNELS_VERSION 1 /* of the operators: raised with every change that a graph or a caller can see */

extern const OrtCustomOp flrc_linear, flrc_embedding, flrc_attention_op;

static const OrtCustomOp *const ALL[] = {&flrc_linear, &flrc_embedding, &flrc_attention_op};

FLRC_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);
FLRC_EXPORT int flrc_kernels_version(void);
FLRC_EXPORT const char *flrc_kernels_isa(void);
FLRC_EXPORT int Java_dev_flrc_engine_decode_Kernels_version(void *environment, void *type);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->get_api(FLRC_ORT_VERSION);
  if (!api) return NULL; /* onnxruntime before 1.17: the session then says that it does not know the operators */
  OrtCustomOpDomain *domain = NULL;
  OrtStatus *status = ORT(api, CreateCustomOpDomain)("flrc", &domain);
  for (size_t i = 0; !status && i < sizeof ALL / sizeof *ALL; i++) status = ORT(api, CustomOpDomain_Add)(domain, ALL[i]);
  if (!status) status = ORT(api, AddCustomOpDomain)(options, domain);
  return status;
}

int flrc_kernels_version(void) { return FLRC_KERNELS_VERSION; }

/* The same for a JVM, which calls no function of another name (android_demo). */
int Java_dev_flrc_engine_decode_Kernels_version(void *environment, void *type) {
  (void)environment, (void)type;
  return FLRC_KERNELS_VERSION;
}

/* The instruction set in use; NULL if FLRC_EDGE_ISA names none of this machine. */
const char *flrc_kernels_isa(void) {
  const flrc_isa *isa = flrc_best_isa();
  return isa ? isa->name : NULL;
}
