// The library's version.
#include "flash_mla/version.h"

namespace flash_mla {

const char* version() noexcept { return FLASH_MLA_VERSION_STRING; }

}  // namespace flash_mla
