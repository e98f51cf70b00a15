// Tensor maps (TMA descriptors) of a paged KV cache, made once per cache and remembered.
#include "cuda/common/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <memory>
#include <new>

#include "cuda/common/error.h"
#include "flash_mla/decode.h"

namespace flash_mla::cuda {
namespace {

constexpr int kRank = 5;
constexpr std::int64_t kPageRows = 64;
constexpr std::int64_t kTileColumns = 64;  // 128 bytes: the width of the swizzle
constexpr std::int64_t kColumnTiles = kHeadDimQk / kTileColumns;
constexpr std::int64_t kElementBytes = 2;
constexpr cuuint32_t kPartTiles = 4;
constexpr cuuint32_t kRopeTiles = 1;
constexpr std::size_t kCacheEntries = 256;  // power of two; engines have 27 to 128 layers

struct Key {
  const void* data = nullptr;
  std::int64_t stride_page = 0, stride_row = 0, stride_head = 0;
  std::int32_t num_pages = 0, h_kv = 0;
  std::int32_t device = 0;
  DType dtype = DType::kUndefined;
  friend bool operator==(const Key&, const Key&) noexcept = default;
};

struct Entry {
  CUtensorMap part_map, rope_map;
  Key key;
};

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// The driver's encoder; null when the driver does not have it. Looked up, so that the library loads
// where there is no driver.
Encode find_encode() noexcept {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  return reinterpret_cast<Encode>(function);
}

// A stride that no coordinate other than 0 is multiplied with may be anything in the tensor, but
// not in the map. Neither may the address be null, as that of a cache without pages may be.
Key make_key(const DecodeParams& params, std::int32_t device) noexcept {
  if (params.num_pages == 0) {
    return {.data = params.q,
            .stride_page = kHeadDimQk,
            .stride_row = kHeadDimQk,
            .stride_head = kHeadDimQk,
            .num_pages = 0,
            .h_kv = 1,
            .device = device,
            .dtype = params.dtype};
  }
  return {.data = params.kv_cache,
          .stride_page = params.num_pages > 1 ? params.stride_kv_page : kHeadDimQk,
          .stride_row = params.stride_kv_row,
          .stride_head = params.h_kv > 1 ? params.stride_kv_head : kHeadDimQk,
          .num_pages = params.num_pages,
          .h_kv = params.h_kv,
          .device = device,
          .dtype = params.dtype};
}

std::size_t cache_slot(const Key& key) noexcept {
  // The fields besides the address seldom differ between caches that are alive together.
  constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15;  // Fibonacci hashing
  const std::uint64_t mixed =
      (reinterpret_cast<std::uintptr_t>(key.data) + static_cast<std::uint64_t>(key.num_pages)) *
      kGolden;
  return static_cast<std::size_t>(mixed >> 32) % kCacheEntries;
}

Status encode_map(Encode encode, const Key& key, cuuint32_t tiles, CUtensorMap* map) noexcept {
  const cuuint64_t dims[kRank] = {kTileColumns, kPageRows, kColumnTiles,
                                  static_cast<cuuint64_t>(key.h_kv),
                                  static_cast<cuuint64_t>(key.num_pages)};
  const cuuint64_t dims_without_pages[kRank] = {kTileColumns, 1, 1, 1, 1};
  const cuuint64_t strides[kRank - 1] = {static_cast<cuuint64_t>(key.stride_row * kElementBytes),
                                         kTileColumns * kElementBytes,
                                         static_cast<cuuint64_t>(key.stride_head * kElementBytes),
                                         static_cast<cuuint64_t>(key.stride_page * kElementBytes)};
  const cuuint32_t box[kRank] = {kTileColumns, kPageRows, tiles, 1, 1};
  const cuuint32_t element_strides[kRank] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = key.dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(
      map, type, kRank, const_cast<void*>(key.data), key.num_pages > 0 ? dims : dims_without_pages,
      strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::error(StatusCode::kCudaError,
                       "decode: cuTensorMapEncodeTiled failed with CUresult %d for kv_cache = %p, "
                       "%d pages, %d heads, strides %lld, %lld, %lld",
                       static_cast<int>(result), key.data, key.num_pages, key.h_kv,
                       static_cast<long long>(key.stride_page),
                       static_cast<long long>(key.stride_row),
                       static_cast<long long>(key.stride_head));
}

}  // namespace

Status kv_tensor_maps(const DecodeParams& params, std::int32_t device, const CUtensorMap** part_map,
                      const CUtensorMap** rope_map) noexcept {
  // On the heap: 80 KB of static thread storage would be charged to every thread of the process.
  thread_local std::unique_ptr<std::array<Entry, kCacheEntries>> cache;
  if (cache == nullptr) {
    cache.reset(new (std::nothrow) std::array<Entry, kCacheEntries>());
    if (cache == nullptr) {
      return Status::error(StatusCode::kInternal, "decode: out of host memory for tensor maps");
    }
  }
  const Key key = make_key(params, device);
  Entry& entry = (*cache)[cache_slot(key)];
  if (!(entry.key == key)) {
    static const Encode encode = find_encode();
    if (encode == nullptr) {
      return Status::error(
          StatusCode::kCudaError,
          "decode: the driver has no cuTensorMapEncodeTiled; update the NVIDIA driver");
    }
    entry.key = {};
    FLASH_MLA_RETURN_IF_ERROR(encode_map(encode, key, kPartTiles, &entry.part_map));
    FLASH_MLA_RETURN_IF_ERROR(encode_map(encode, key, kRopeTiles, &entry.rope_map));
    entry.key = key;
  }
  *part_map = &entry.part_map;
  *rope_map = &entry.rope_map;
  return {};
}

}  // namespace flash_mla::cuda
