// All of the public C++ API.
#pragma once

#include "flash_mla/backend.h"  // IWYU pragma: export
#include "flash_mla/cache.h"    // IWYU pragma: export
#include "flash_mla/decode.h"   // IWYU pragma: export
#include "flash_mla/merge.h"    // IWYU pragma: export
#include "flash_mla/status.h"   // IWYU pragma: export
#include "flash_mla/tensor.h"   // IWYU pragma: export
#include "flash_mla/version.h"  // IWYU pragma: export
