/* The C ABI: what the C++ API does, for other languages. Plain structs, no C++ in it.
 *
 * Every struct that may grow starts with its size: set `struct_size = sizeof(the struct)`, zero the
 * rest, then fill in. Enumerations are int32_t with the values of status.h, tensor.h and decode.h.
 * Semantics, shapes and errors: decode.h, cache.h, merge.h, backend.h.
 */
#ifndef FLASH_MLA_C_API_H_
#define FLASH_MLA_C_API_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FLASH_MLA_OK = 0,
  FLASH_MLA_INVALID_ARGUMENT = 1,
  FLASH_MLA_INVALID_TYPE = 2,
  FLASH_MLA_UNSUPPORTED = 3,
  FLASH_MLA_UNAVAILABLE = 4,
  FLASH_MLA_CUDA_ERROR = 5,
  FLASH_MLA_INTERNAL = 6
};
enum {
  FLASH_MLA_UNDEFINED = 0,
  FLASH_MLA_BF16 = 1,
  FLASH_MLA_FP16 = 2,
  FLASH_MLA_FP32 = 3,
  FLASH_MLA_INT32 = 4,
  FLASH_MLA_INT64 = 5,
  FLASH_MLA_FP8_E4M3 = 6,
  FLASH_MLA_UINT8 = 7
};
enum { FLASH_MLA_CPU = 0, FLASH_MLA_CUDA = 1 };

#define FLASH_MLA_MAX_RANK 6
#define FLASH_MLA_MAX_MESSAGE 320

/* Result of every call. `message` is terminated, empty when ok. */
typedef struct flash_mla_status {
  int32_t code;
  char message[FLASH_MLA_MAX_MESSAGE];
} flash_mla_status;

/* A borrowed, strided tensor; strides in elements. All zero means "not given". */
typedef struct flash_mla_tensor {
  void* data;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
  int32_t rank;
  int64_t shape[FLASH_MLA_MAX_RANK];
  int64_t stride[FLASH_MLA_MAX_RANK];
} flash_mla_tensor;

typedef struct flash_mla_decode_args {
  size_t struct_size;
  flash_mla_tensor q, kv_cache, block_table, cache_seqlens, out, lse;
  double softmax_scale;      /* read when has_softmax_scale, else 576 ** -0.5 */
  int32_t has_softmax_scale; /* booleans are 0 or 1 */
  int32_t causal;
  int32_t empty_lse; /* 0: +inf, 1: -inf */
  int32_t batch_invariant;
  int32_t validate;
} flash_mla_decode_args;

typedef struct flash_mla_plan {
  size_t struct_size;
  flash_mla_tensor metadata, num_splits;
} flash_mla_plan;

typedef struct flash_mla_workspace {
  size_t struct_size;
  void* counters;
  size_t counters_size;
  void* partials;
  size_t partials_size;
} flash_mla_workspace;

typedef struct flash_mla_append_kv_args {
  size_t struct_size;
  flash_mla_tensor kv_c, k_pe, kv_cache, slot_mapping;
} flash_mla_append_kv_args;

typedef struct flash_mla_merge_states_args {
  size_t struct_size;
  const flash_mla_tensor* outs;
  const flash_mla_tensor* lses;
  int32_t num_parts;
  int32_t empty_lse;
  flash_mla_tensor out, lse;
} flash_mla_merge_states_args;

const char* flash_mla_version(void);
int32_t flash_mla_built_with_cuda(void);
int32_t flash_mla_cuda_device_count(void);

flash_mla_status flash_mla_plan_size(const flash_mla_decode_args* args, int32_t* num_parts);
flash_mla_status flash_mla_workspace_size(const flash_mla_decode_args* args, size_t* counters_size,
                                          size_t* partials_size);
flash_mla_status flash_mla_init_workspace(const flash_mla_workspace* workspace, int32_t device_type,
                                          int32_t device_index, void* stream);
flash_mla_status flash_mla_plan_decode(const flash_mla_decode_args* args,
                                       const flash_mla_plan* plan, void* stream);
/* plan may be null; workspace may be null on the CPU. */
flash_mla_status flash_mla_decode(const flash_mla_decode_args* args, const flash_mla_plan* plan,
                                  const flash_mla_workspace* workspace, void* stream);
flash_mla_status flash_mla_is_supported(const flash_mla_decode_args* args);
flash_mla_status flash_mla_describe_decode(const flash_mla_decode_args* args, char* text,
                                           size_t size);
flash_mla_status flash_mla_append_kv(const flash_mla_append_kv_args* args, void* stream);
flash_mla_status flash_mla_merge_states(const flash_mla_merge_states_args* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_API_H_ */
