// append_kv: check the arguments, choose the backend, call it.
#include "flash_mla/cache.h"

#include "api/validate.h"
#include "cpu/cpu.h"
#ifdef FLASH_MLA_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace flash_mla {

Status append_kv(const AppendKvArgs& args, StreamHandle stream) noexcept {
  AppendKvParams params;
  FLASH_MLA_RETURN_IF_ERROR(api::check_append_kv(args, &params));
  if (params.t == 0) return {};
#ifdef FLASH_MLA_WITH_CUDA
  const Device device = args.kv_c.device;
  if (device.type == DeviceType::kCuda) return cuda::append_kv(params, device.index, stream);
#endif
  static_cast<void>(stream);
  return cpu::append_kv(params);
}

}  // namespace flash_mla
