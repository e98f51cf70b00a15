// merge_states: check the arguments, choose the backend, call it.
#include "flash_mla/merge.h"

#include "api/validate.h"
#include "cpu/cpu.h"
#ifdef FLASH_MLA_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace flash_mla {

Status merge_states(const MergeStatesArgs& args, StreamHandle stream) noexcept {
  MergeStatesParams params;
  FLASH_MLA_RETURN_IF_ERROR(api::check_merge_states(args, &params));
  if (params.b == 0 || params.s_q == 0 || params.h_q == 0) return {};
#ifdef FLASH_MLA_WITH_CUDA
  const Device device = args.out.device;
  if (device.type == DeviceType::kCuda) return cuda::merge_states(params, device.index, stream);
#endif
  static_cast<void>(stream);
  return cpu::merge_states(params);
}

}  // namespace flash_mla
