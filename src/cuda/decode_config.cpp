// Chooses how a decode is laid out on a device, from shapes alone.
#include <algorithm>

#include "cuda/common/properties.h"
#include "cuda/common/tensor_map.h"
#include "cuda/cuda.h"
#include "cuda/sm90/decode_dense/sizes.h"

namespace flash_mla::cuda {
namespace {

// Cost of a work item besides its blocks, in blocks of 64 tokens. Of 1, 2 and 5, 2 was never the
// slowest; 1 lost 6 to 15 % at b 256, h_q 128, s_kv 2048 (bench/results/steps/2026-11-24-h100).
constexpr std::int32_t kItemOverhead = 2;

// Blocks of a piece at least. One page more costs less than twice as many partial results, unless
// they are small: b 1, h_q 128, s_kv 4096 took 24.4 us with 2, 26.5 with 1; h_q 16, s_kv 1024 takes
// 15.6 and 14.6 (same place).
std::int32_t least_blocks(std::int32_t rows) { return rows > 16 ? 2 : 1; }

// The team of row groups that reads every page together: the one that leaves the fewest clusters
// idle. A larger one wins a tie, because its pages are read from memory fewer times; alone, a pair
// of many reads each page once per 128 rows, which memory does not keep up with.
std::int32_t choose_team(std::int32_t groups, std::int32_t clusters) {
  std::int32_t best = 1;
  double best_score = 0;
  for (std::int32_t team = 1; team <= std::min(groups, clusters); ++team) {
    const std::int32_t chunks = ceil_div(groups, team);
    const double busy = static_cast<double>(clusters / team * team) / clusters;
    const double useful = static_cast<double>(groups) / (chunks * team);
    const double score = busy * useful * (team == 1 && groups > 1 ? 0.8 : 1.0);
    if (score >= best_score) {
      best = team;
      best_score = score;
    }
  }
  return best;
}

}  // namespace

Status decode_config(const DecodeParams& params, std::int32_t device,
                     DecodeConfig* config) noexcept {
  const DeviceProperties* properties = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(device_properties(device, &properties));
  if (!is_hopper(*properties)) {
    return Status::error(
        StatusCode::kUnavailable,
        "decode: device %d has compute capability %d.%d, the CUDA backend needs 9.0 (Hopper)",
        device, properties->compute_capability_major, properties->compute_capability_minor);
  }
  if (params.page_size != decode_dense::kPageTokens) {
    return Status::error(
        StatusCode::kUnsupported,
        "decode: kv_cache.shape[1] (page_size) = %d, the CUDA backend supports {64}",
        params.page_size);
  }
  const std::int32_t rows = std::max(query_rows(params).count(params), 1);
  config->cluster = rows > decode_dense::kTileRows ? 2 : 1;
  const std::int32_t ctas = std::min(properties->num_sms, decode_dense::kMaxCtas);
  const std::int32_t clusters = ctas / config->cluster;
  const std::int32_t groups = ceil_div(rows, decode_dense::kTileRows * config->cluster);
  ScheduleShape& schedule = config->schedule;
  schedule.team = choose_team(groups, clusters);
  schedule.num_parts = clusters / schedule.team;
  schedule.overhead = kItemOverhead;
  schedule.min_blocks = least_blocks(rows);
  schedule.split = params.split;
  schedule.rows = rows;
  // A tile begins at any row only where rows lie one after the other.
  schedule.levels = params.split && query_rows(params).dense && rows > 16 ? kTileLevels : 1;
  for (std::int32_t level = 0; level < kTileLevels; ++level) {
    const std::int32_t tile_rows = decode_dense::kTileRows >> level;
    const std::int32_t chunks =
        ceil_div<std::int32_t>(ceil_div(rows, tile_rows * config->cluster), schedule.team);
    schedule.chunks_at[level] = chunks;
    schedule.items_at[level] = std::max(params.h_kv, 1) * chunks;
  }
  schedule.chunks = schedule.chunks_at[0];
  schedule.items_per_request = schedule.items_at[0];
  config->ctas = schedule.num_parts * schedule.team * config->cluster;
  // The same for all shapes, so that a workspace can serve every call.
  config->counters_size = ctas * sizeof(std::uint64_t);
  config->memos_at = ctas * 2 * decode_dense::kPartialBytes;
  config->partials_size = config->memos_at + ctas * decode_dense::kMemoBytes;
  return {};
}

}  // namespace flash_mla::cuda
