// Products and attention for AVX2.

#include "engines.h"

#ifdef QJAX_X86
QJAX_TARGET("avx2,fma,f16c")
namespace qjax::avx2 {
#define QJAX_LANES_AVX2
#include "each_isa.h"
}  // namespace qjax::avx2
QJAX_TARGET_END

namespace qjax {
const Engine kAvx2 = QJAX_ENGINE(avx2);
}
#endif
