// The kernels for AVX2, FMA and F16C.
//
// The tile, measured on one core of an EPYC 7003 (bf16, s_kv = 4096; GFLOPS at h_q = 16 and 128):
// 3 x 4: 52, 60; 6 x 2: 51, 48; 5 x 2: 47, 51; 4 x 2: 44, 52.
#define FLASH_MLA_CPU_LANES 8
#define FLASH_MLA_CPU_ROW_TILE 3
#define FLASH_MLA_CPU_COLUMN_TILE 4
#include "cpu/decode_kernel.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {

const Kernels kAvx2Kernels = {.name = "avx2",
                              .max_rows = 64,
                              .chunk_tokens = 256,
                              .scratch_size = kScratchSize<>,
                              .decode_chunk = decode_chunk<>,
                              .finish = finish,
                              .merge_row = merge_row};

}  // namespace flash_mla::cpu
