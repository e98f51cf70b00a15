// The kernels for AVX-512 F, BW, DQ and VL.
#define FLASH_MLA_CPU_LANES 16
#define FLASH_MLA_CPU_ROW_TILE 6
#define FLASH_MLA_CPU_COLUMN_TILE 4
#include "cpu/decode_kernel.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {

const Kernels kAvx512Kernels = {"avx512", kScratchSize<>, decode_chunk<>, finish, merge_row};

}  // namespace flash_mla::cpu
