// Barriers, fences and register reallocation: thin names over CCCL's cuda::ptx, and the few
// instructions it lacks.
#pragma once

#include <cstdint>
#include <cuda/ptx>

namespace flash_mla::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read from the hardware where it stands: what is computed from it is not kept in
// registers meanwhile.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Likewise blockIdx.x and gridDim.x.
__device__ __forceinline__ uint32_t cta_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ uint32_t cta_count() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(count));
  return count;
}

// Waits until the phase with this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Arrives at the same barrier of CTA `rank` of the cluster.
//
// NOTE: at the default scope, as CUTLASS has it. What is signalled is that this CTA has finished
// reading a buffer (wgmma_wait, or a proxy fence), and nothing is published to the other CTA. With
// .release.cluster ptxas puts MEMBAR.ALL.GPU before each arrival, and the whole decode ran at 430
// instead of 524 TFLOPS (nvcc 13.0, b 128, h_q 128, s_kv 8192).
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Named barrier: `threads` threads meet.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes this thread's writes to shared memory visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for writes to global memory, of other threads too that this one knows to be done.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A counter that CTAs anywhere on the GPU add to: what the other CTAs wrote before they added is
// visible to who sees the sum.
// (__threadfence() around a relaxed atomicAdd would be a sequentially consistent fence, which costs
// more.)
__device__ __forceinline__ unsigned long long load_acquire_gpu(const unsigned long long* pointer) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
  return value;
}
__device__ __forceinline__ unsigned long long atomic_add_gpu(unsigned long long* pointer,
                                                             unsigned long long addend) {
  unsigned long long before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(pointer), "l"(addend)
               : "memory");
  return before;
}
// The same by somebody who need not know.
__device__ __forceinline__ void reduce_add_release(unsigned long long* pointer,
                                                   unsigned long long addend) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(pointer), "l"(addend) : "memory");
}
// The same where nothing is published with it.
__device__ __forceinline__ unsigned long long atomic_add_relaxed(unsigned long long* pointer,
                                                                 unsigned long long addend) {
  unsigned long long before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(pointer), "l"(addend)
               : "memory");
  return before;
}

}  // namespace flash_mla::cuda::ptx
