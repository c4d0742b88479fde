/* What onnxruntime calls when the library is named as one of custom operators: the domain flrc. */
#include "ort_api.h"

extern const OrtCustomOp flrc_linear;

#if defined(_WIN32)
__declspec(dllexport)
#endif
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->get_api(FLRC_ORT_VERSION);
  if (!api) return NULL; /* onnxruntime before 1.17: the session then says that it does not know the operators */
  OrtCustomOpDomain *domain = NULL;
  OrtStatus *status = ORT(api, CreateCustomOpDomain)("flrc", &domain);
  if (!status) status = ORT(api, CustomOpDomain_Add)(domain, &flrc_linear);
  if (!status) status = ORT(api, AddCustomOpDomain)(options, domain);
  return status;
}
