#include "native.h"

BALCAPRL_EXPORT int32_t balcaprl_abi_version() { return balcaprl::kAbiVersion; }
