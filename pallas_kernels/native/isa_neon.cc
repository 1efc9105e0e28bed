// Products and attention for NEON with dot products.

#include "engines.h"

#ifdef QJAX_ARM
#if defined(__clang__)
QJAX_TARGET("dotprod")
#else
QJAX_TARGET("arch=armv8.2-a+dotprod")
#endif
namespace qjax::neon {
#define QJAX_LANES_NEON
#include "each_isa.h"
}  // namespace qjax::neon
QJAX_TARGET_END

namespace qjax {
const Engine kNeon = QJAX_ENGINE(neon);
}
#endif
