// The checks of user input, the only ones in the library: each either fills a parameter struct or
// says what is wrong. None of them calls a backend or reads what a data pointer points to.
#pragma once

#include <cstddef>

#include "core/params.h"
#include "flash_mla/cache.h"
#include "flash_mla/decode.h"
#include "flash_mla/merge.h"
#include "flash_mla/status.h"

namespace flash_mla::api {

// How much of a DecodeArgs a function looks at.
enum class DecodeCheck {
  kSizes,   // plan_size, workspace_size: shapes, dtypes and device of q and kv_cache
  kPlan,    // plan_decode: all inputs; of the data pointers, cache_seqlens alone
  kShapes,  // is_supported, describe_decode: everything but data pointers
  kAll,     // decode
};

// `function` is the name that messages start with.
Status check_decode(const char* function, const DecodeArgs& args, DecodeCheck level,
                    DecodeParams* params) noexcept;

// The form of a plan for these params; how many rows metadata may have is for the caller to check.
Status check_plan(const char* function, const DecodePlan& plan, const DecodeParams& params,
                  Device device, bool num_splits_optional, PlanParams* plan_params) noexcept;

// Pointers, alignment and sizes of a workspace; the sizes are what it has to have at least.
Status check_workspace(const char* function, const Workspace& workspace, std::size_t counters_size,
                       std::size_t partials_size) noexcept;

Status check_append_kv(const AppendKvArgs& args, AppendKvParams* params) noexcept;

Status check_merge_states(const MergeStatesArgs& args, MergeStatesParams* params) noexcept;

// kInvalidArgument for a device that cannot exist, kUnavailable for CUDA in a build without it.
Status check_device(const char* function, const char* name, Device device) noexcept;

}  // namespace flash_mla::api
