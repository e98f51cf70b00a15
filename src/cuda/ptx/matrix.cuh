// From shared memory to registers in the layout of matrix fragments: four 8 x 8 matrices of 16-bit
// elements at a time. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes).
#pragma once

#include <cstdint>

namespace flash_mla::cuda::ptx {

__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

}  // namespace flash_mla::cuda::ptx
