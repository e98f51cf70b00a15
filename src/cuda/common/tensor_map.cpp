// Tensor maps (TMA descriptors): of a paged KV cache, made once per cache and remembered, and of
// the queries.
#include "cuda/common/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <memory>
#include <new>

#include "core/schedule.h"
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

// What differs between the maps; element type by dtype, 128-byte swizzle, zeros outside.
struct MapShape {
  void* data;
  DType dtype;
  std::array<cuuint64_t, kRank> dims;
  std::array<std::int64_t, kRank - 1> strides;  // of axes 1 .., in elements
  std::array<cuuint32_t, kRank> box;
};

Status encode_map(const char* tensor, const MapShape& shape, CUtensorMap* map) noexcept {
  static const Encode encode = find_encode();
  if (encode == nullptr) {
    return Status::error(
        StatusCode::kCudaError,
        "decode: the driver has no cuTensorMapEncodeTiled; update the NVIDIA driver");
  }
  cuuint64_t strides[kRank - 1];
  for (int i = 0; i < kRank - 1; ++i) {
    strides[i] = static_cast<cuuint64_t>(shape.strides[i] * kElementBytes);
  }
  constexpr cuuint32_t kElementStrides[kRank] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = shape.dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, kRank, shape.data, shape.dims.data(), strides, shape.box.data(),
             kElementStrides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::error(
      StatusCode::kCudaError,
      "decode: cuTensorMapEncodeTiled failed with CUresult %d for %s at %p, strides "
      "%lld, %lld, %lld, %lld",
      static_cast<int>(result), tensor, shape.data, static_cast<long long>(shape.strides[0]),
      static_cast<long long>(shape.strides[1]), static_cast<long long>(shape.strides[2]),
      static_cast<long long>(shape.strides[3]));
}

Status encode_kv_map(const Key& key, cuuint32_t tiles, CUtensorMap* map) noexcept {
  MapShape shape = {const_cast<void*>(key.data),
                    key.dtype,
                    {kTileColumns, kPageRows, kColumnTiles, static_cast<cuuint64_t>(key.h_kv),
                     static_cast<cuuint64_t>(key.num_pages)},
                    {key.stride_row, kTileColumns, key.stride_head, key.stride_page},
                    {kTileColumns, kPageRows, tiles, 1, 1}};
  if (key.num_pages == 0) shape.dims = {kTileColumns, 1, 1, 1, 1};
  return encode_map("kv_cache", shape, map);
}

}  // namespace

Status kv_tensor_maps(const DecodeParams& params, std::int32_t device, CUtensorMap* part_map,
                      CUtensorMap* rope_map) noexcept {
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
    entry.key = {};
    FLASH_MLA_RETURN_IF_ERROR(encode_kv_map(key, kPartTiles, &entry.part_map));
    FLASH_MLA_RETURN_IF_ERROR(encode_kv_map(key, kRopeTiles, &entry.rope_map));
    entry.key = key;
  }
  *part_map = entry.part_map;
  *rope_map = entry.rope_map;
  return {};
}

QueryRows query_rows(const DecodeParams& params) noexcept {
  const std::int32_t heads = params.h_kv > 0 ? params.h_q / params.h_kv : 0;
  if (params.s_q <= 1 ||
      (params.h_kv == 1 && params.stride_q_s == params.h_q * params.stride_q_h)) {
    return {heads, true};
  }
  // Padded, so that a tile of 64 rows is a box of whole tokens, or part of one token.
  const auto power = static_cast<std::int32_t>(std::bit_ceil(static_cast<std::uint32_t>(heads)));
  return {heads <= kPageRows ? power
                             : ceil_div(heads, std::int32_t{kPageRows}) * std::int32_t{kPageRows},
          false};
}

Status query_tensor_maps(const DecodeParams& params, const QueryRows& rows, CUtensorMap* part_map,
                         CUtensorMap* rope_map) noexcept {
  const auto extent = [](std::int64_t n) { return static_cast<cuuint64_t>(n); };
  // As in make_key(): a stride that is never used may be anything in the tensor.
  const auto stride = [](std::int64_t stride, std::int64_t n) {
    return n > 1 ? stride : kHeadDimQk;
  };
  const std::int64_t heads = rows.dense ? std::int64_t{params.s_q} * params.h_q : params.h_q;
  const std::int64_t tokens = rows.dense ? 1 : params.s_q;
  const auto box_heads = static_cast<cuuint32_t>(
      rows.dense ? kPageRows : std::min<std::int64_t>(rows.width, kPageRows));
  MapShape shape = {
      const_cast<void*>(params.q),
      params.dtype,
      {kTileColumns, extent(heads), extent(tokens), kColumnTiles, extent(params.b)},
      {stride(params.stride_q_h, heads), stride(params.stride_q_s, tokens), kTileColumns,
       stride(params.stride_q_b, params.b)},
      {kTileColumns, box_heads, static_cast<cuuint32_t>(kPageRows) / box_heads, kPartTiles, 1}};
  FLASH_MLA_RETURN_IF_ERROR(encode_map("q", shape, part_map));
  shape.box[3] = kRopeTiles;
  return encode_map("q", shape, rope_map);
}

}  // namespace flash_mla::cuda
