// XLA's FFI, at the version that handlers report.

#pragma once

#include "xla/ffi/api/c_api.h"
// A runtime refuses handlers that report a newer minor version than its own. Minor
// versions only add to the interface and nothing younger than 0.3 is used here, so that
// is what the handlers report, whichever headers they are built with.
#if XLA_FFI_API_MAJOR == 0 && XLA_FFI_API_MINOR > 3
#undef XLA_FFI_API_MINOR
#define XLA_FFI_API_MINOR 3
#endif
#include "xla/ffi/api/ffi.h"
