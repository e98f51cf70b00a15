// The kernels for AVX-512 F, BW, DQ and VL.
#define FLASH_MLA_CPU_LANES 16
#define FLASH_MLA_CPU_ROW_TILE 6
#define FLASH_MLA_CPU_COLUMN_TILE 4
#include "cpu/decode_kernel.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {

const Kernels kAvx512Kernels = {.name = "avx512",
                                .max_rows = 64,
                                .chunk_tokens = 256,
                                .scratch_size = kScratchSize<>,
                                .decode_chunk = decode_chunk<>,
                                .finish = finish,
                                .merge_row = merge_row};

}  // namespace flash_mla::cpu
