// The kernels for any architecture: vectors of 4 lanes.
#define FLASH_MLA_CPU_LANES 4
#define FLASH_MLA_CPU_ROW_TILE 4
#define FLASH_MLA_CPU_COLUMN_TILE 2
#include "cpu/decode_kernel.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {

const Kernels kBaselineKernels = {.name = "baseline",
                                  .max_rows = 64,
                                  .chunk_tokens = 256,
                                  .scratch_size = kScratchSize<>,
                                  .decode_chunk = decode_chunk<>,
                                  .finish = finish,
                                  .merge_row = merge_row};

}  // namespace flash_mla::cpu
