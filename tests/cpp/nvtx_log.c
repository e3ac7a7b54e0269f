/* A profiler of the smallest kind: writes "domain/name" for each NVTX range that a program pushes, into the file that
 * NVTX_LOG names. Loaded into it by NVTX_INJECTION64_PATH. */
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static nvtxDomainHandle_t CreateDomain(const char* name) { return (nvtxDomainHandle_t)strdup(name); }

static int PushRange(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const int is_text = event->messageType == NVTX_MESSAGE_TYPE_ASCII;
  FILE* log = fopen(getenv("NVTX_LOG"), "a");
  if (log == NULL) return -1;
  fprintf(log, "%s/%s\n", domain != NULL ? (const char*)domain : "", is_text ? event->message.ascii : "");
  fclose(log);
  return 0;
}

int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_export_table) {
  const NvtxExportTableCallbacks* callbacks = get_export_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable table;
  unsigned int size;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)CreateDomain;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)PushRange;
  return 1;
}
