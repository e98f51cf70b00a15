// The kernels for AVX2, FMA and F16C.
#define FLASH_MLA_CPU_LANES 8
#define FLASH_MLA_CPU_ROW_TILE 6
#define FLASH_MLA_CPU_COLUMN_TILE 2
#include "cpu/decode_kernel.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {

const Kernels kAvx2Kernels = {"avx2", kScratchSize<>, decode_chunk<>, finish, merge_row};

}  // namespace flash_mla::cpu
