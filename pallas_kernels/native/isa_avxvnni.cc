// Products and attention for AVX2 with VNNI.

#include "engines.h"

#ifdef QJAX_X86
QJAX_TARGET("avx2,fma,f16c,avxvnni")
namespace qjax::avxvnni {
#define QJAX_LANES_AVXVNNI
#include "each_isa.h"
}  // namespace qjax::avxvnni
QJAX_TARGET_END

namespace qjax {
const Engine kAvxVnni = QJAX_ENGINE(avxvnni);
}
#endif
