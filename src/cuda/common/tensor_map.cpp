// Tensor maps (TMA descriptors) of a paged KV cache and of the queries. A decode needs four, and
// each thread remembers those it has made, until another one takes their place.
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
constexpr std::int32_t kPartTiles = 4;
constexpr std::int32_t kRopeTiles = 1;
// Of 256 bytes; a power of two. Engines have 27 to 128 layers with a cache each, and their queries
// come to lie in a few places.
constexpr std::size_t kCacheEntries = 1024;

// What differs between the maps; element type by dtype, 128-byte swizzle, zeros outside.
struct MapShape {
  const void* data = nullptr;
  std::array<std::int64_t, kRank> dims = {};
  std::array<std::int64_t, kRank - 1> strides = {};  // of axes 1 .., in elements
  std::array<std::int32_t, kRank> box = {};
  DType dtype = DType::kUndefined;
  friend bool operator==(const MapShape&, const MapShape&) noexcept = default;
};

struct Entry {
  CUtensorMap map;
  MapShape shape;
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

Status encode_map(const char* tensor, const MapShape& shape, CUtensorMap* map) noexcept {
  static const Encode encode = find_encode();
  if (encode == nullptr) {
    return Status::error(
        StatusCode::kCudaError,
        "decode: the driver has no cuTensorMapEncodeTiled; update the NVIDIA driver");
  }
  cuuint64_t dims[kRank], strides[kRank - 1];
  cuuint32_t box[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = static_cast<cuuint64_t>(shape.dims[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    if (i + 1 < kRank) strides[i] = static_cast<cuuint64_t>(shape.strides[i] * kElementBytes);
  }
  constexpr cuuint32_t kElementStrides[kRank] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = shape.dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(shape.data), dims, strides, box, kElementStrides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
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

std::size_t cache_slot(const MapShape& shape) noexcept {
  // The rest seldom differs between tensors that are alive together. Mixed well (as splitmix64
  // does it), since tensors lie evenly spaced.
  std::uint64_t x = reinterpret_cast<std::uintptr_t>(shape.data) +
                    (static_cast<std::uint64_t>(shape.dims[kRank - 1]) << 8) +
                    static_cast<std::uint64_t>(shape.box[2] + shape.box[3]);
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return static_cast<std::size_t>(x ^ x >> 31) % kCacheEntries;
}

// Makes the map, or finds it among those that this thread has made.
Status find_map(const char* tensor, const MapShape& shape, CUtensorMap* map) noexcept {
  // On the heap: static thread storage would be charged to every thread of the process.
  thread_local std::unique_ptr<std::array<Entry, kCacheEntries>> cache;
  if (cache == nullptr) {
    cache.reset(new (std::nothrow) std::array<Entry, kCacheEntries>());
    if (cache == nullptr) {
      return Status::error(StatusCode::kInternal, "decode: out of host memory for tensor maps");
    }
  }
  Entry& entry = (*cache)[cache_slot(shape)];
  if (!(entry.shape == shape)) {
    entry.shape = {};
    FLASH_MLA_RETURN_IF_ERROR(encode_map(tensor, shape, &entry.map));
    entry.shape = shape;
  }
  *map = entry.map;
  return {};
}

// The maps whose boxes have so many tiles, along that axis, as half of a row has, and one.
Status find_maps(const char* tensor, MapShape shape, int tile_axis, CUtensorMap* part_map,
                 CUtensorMap* rope_map) noexcept {
  shape.box[tile_axis] = kPartTiles;
  FLASH_MLA_RETURN_IF_ERROR(find_map(tensor, shape, part_map));
  shape.box[tile_axis] = kRopeTiles;
  return find_map(tensor, shape, rope_map);
}

// A stride that no coordinate other than 0 is multiplied with may be anything in the tensor, but
// not in the map.
std::int64_t stride_or_any(std::int64_t stride, std::int64_t extent) noexcept {
  return extent > 1 ? stride : kHeadDimQk;
}

}  // namespace

Status kv_tensor_maps(const DecodeParams& params, CUtensorMap* part_map,
                      CUtensorMap* rope_map) noexcept {
  MapShape shape = {
      params.kv_cache,
      {kTileColumns, kPageRows, kColumnTiles, params.h_kv, params.num_pages},
      {params.stride_kv_row, kTileColumns, stride_or_any(params.stride_kv_head, params.h_kv),
       stride_or_any(params.stride_kv_page, params.num_pages)},
      {kTileColumns, kPageRows, 1, 1, 1},
      params.dtype};
  if (params.num_pages == 0) {  // no page is loaded, but the address must not be null
    shape.data = params.q;
    shape.dims = {kTileColumns, 1, 1, 1, 1};
    shape.strides = {kHeadDimQk, kTileColumns, kHeadDimQk, kHeadDimQk};
  }
  return find_maps("kv_cache", shape, 2, part_map, rope_map);
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
  const std::int64_t heads = rows.dense ? std::int64_t{params.s_q} * params.h_q : params.h_q;
  const std::int64_t tokens = rows.dense ? 1 : params.s_q;
  const auto box_heads = static_cast<std::int32_t>(
      rows.dense ? kPageRows : std::min<std::int64_t>(rows.width, kPageRows));
  MapShape shape = {
      params.q,
      {kTileColumns, heads, tokens, kColumnTiles, params.b},
      {stride_or_any(params.stride_q_h, heads), stride_or_any(params.stride_q_s, tokens),
       kTileColumns, stride_or_any(params.stride_q_b, params.b)},
      {kTileColumns, box_heads, static_cast<std::int32_t>(kPageRows) / box_heads, 1, 1},
      params.dtype};
  return find_maps("q", shape, 3, part_map, rope_map);
}

}  // namespace flash_mla::cuda
