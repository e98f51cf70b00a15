// The library's version. The file VERSION at the root says the same; `make lint` compares the two.
#pragma once

#define FLASH_MLA_VERSION_MAJOR 0
#define FLASH_MLA_VERSION_MINOR 1
#define FLASH_MLA_VERSION_PATCH 0
#define FLASH_MLA_VERSION_STRING "0.1.0"

namespace flash_mla {

// Version of the library that was linked, which may differ from the header's: "0.1.0".
[[nodiscard]] const char* version() noexcept;

}  // namespace flash_mla
