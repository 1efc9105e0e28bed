// Products and attention for AVX-512 with VNNI, and products in the tiles of AMX.

#include "engines.h"

#ifdef QJAX_X86
#define QJAX_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
QJAX_TARGET(QJAX_AVX512)
namespace qjax::avx512 {
#define QJAX_LANES_AVX512
#include "each_isa.h"
}  // namespace qjax::avx512
QJAX_TARGET_END

namespace qjax {
const Engine kAvx512 = QJAX_ENGINE(avx512);
}

#ifdef QJAX_AMX
QJAX_TARGET("amx-tile,amx-int8," QJAX_AVX512)
namespace qjax::avx512 {
#define QJAX_TILES_AMX
#include "tiles.h"
}  // namespace qjax::avx512
QJAX_TARGET_END

namespace qjax {
const Engine kAmx = QJAX_TILED("amx", avx512, 65);
}
#endif
#endif
