/* Decodes one request on the CPU through the C ABI, and shows what an error looks like. */
#include <flash_mla/c_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kHeads = 4, kPages = 3, kPageSize = 64, kTokens = 150, kDimQk = 576, kDimV = 512 };

/* A contiguous CPU tensor. */
static flash_mla_tensor tensor(void* data, int32_t dtype, int32_t rank, const int64_t* shape) {
  flash_mla_tensor view = {0};
  int64_t stride = 1;
  view.data = data;
  view.dtype = dtype;
  view.device_type = FLASH_MLA_CPU;
  view.rank = rank;
  for (int32_t axis = rank - 1; axis >= 0; --axis) {
    view.shape[axis] = shape[axis];
    view.stride[axis] = stride;
    stride *= shape[axis];
  }
  return view;
}

static void fill(float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) values[i] = sinf((float)i);
}

int main(void) {
  static float q[kHeads * kDimQk], kv_cache[kPages * kPageSize * kDimQk];
  static float out[kHeads * kDimV], lse[kHeads];
  int32_t block_table[kPages] = {2, 0, 1};
  int32_t length = kTokens;
  fill(q, sizeof(q) / sizeof(q[0]));
  fill(kv_cache, sizeof(kv_cache) / sizeof(kv_cache[0]));

  flash_mla_decode_args args = {0};
  args.struct_size = sizeof(args);
  args.q = tensor(q, FLASH_MLA_FP32, 4, (int64_t[]){1, 1, kHeads, kDimQk});
  args.kv_cache = tensor(kv_cache, FLASH_MLA_FP32, 4, (int64_t[]){kPages, kPageSize, 1, kDimQk});
  args.block_table = tensor(block_table, FLASH_MLA_INT32, 2, (int64_t[]){1, kPages});
  args.cache_seqlens = tensor(&length, FLASH_MLA_INT32, 1, (int64_t[]){1});
  args.out = tensor(out, FLASH_MLA_FP32, 4, (int64_t[]){1, 1, kHeads, kDimV});
  args.lse = tensor(lse, FLASH_MLA_FP32, 3, (int64_t[]){1, kHeads, 1});
  args.causal = 1;

  flash_mla_status status = flash_mla_decode(&args, NULL, NULL, NULL);
  if (status.code != FLASH_MLA_OK) {
    fprintf(stderr, "%s\n", status.message);
    return EXIT_FAILURE;
  }
  printf("flash_mla %s: %d tokens\n", flash_mla_version(), (int)length);
  for (int head = 0; head < kHeads; ++head) {
    printf("head %d: lse %.4f, out[0] %+.4f\n", head, lse[head], out[head * kDimV]);
    if (!isfinite(lse[head])) return EXIT_FAILURE;
  }

  args.q.shape[3] = 512;
  status = flash_mla_decode(&args, NULL, NULL, NULL);
  printf("a wrong shape: code %d, %s\n", (int)status.code, status.message);
  return status.code == FLASH_MLA_INVALID_ARGUMENT ? EXIT_SUCCESS : EXIT_FAILURE;
}
