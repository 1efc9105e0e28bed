// Includes QJAX_BODY after lanes.h once per instruction set, in a namespace of its own.
// No guard: every source file includes it with its own body.

#ifdef QJAX_X86
QJAX_TARGET(QJAX_AVX512)
namespace qjax::avx512 {
#define QJAX_LANES_AVX512
#include "convert.h"
#include "lanes.h"
#include QJAX_BODY
#undef QJAX_LANES_AVX512
}  // namespace qjax::avx512
QJAX_TARGET_END

QJAX_TARGET("avx2,fma,f16c,avxvnni")
namespace qjax::avxvnni {
#define QJAX_LANES_AVXVNNI
#include "convert.h"
#include "lanes.h"
#include QJAX_BODY
#undef QJAX_LANES_AVXVNNI
}  // namespace qjax::avxvnni
QJAX_TARGET_END

QJAX_TARGET("avx2,fma,f16c")
namespace qjax::avx2 {
#define QJAX_LANES_AVX2
#include "convert.h"
#include "lanes.h"
#include QJAX_BODY
#undef QJAX_LANES_AVX2
}  // namespace qjax::avx2
QJAX_TARGET_END
#endif

#ifdef QJAX_ARM
#if defined(__clang__)
QJAX_TARGET("dotprod")
#else
QJAX_TARGET("arch=armv8.2-a+dotprod")
#endif
namespace qjax::neon {
#define QJAX_LANES_NEON
#include "convert.h"
#include "lanes.h"
#include QJAX_BODY
#undef QJAX_LANES_NEON
}  // namespace qjax::neon
QJAX_TARGET_END
#endif

#undef UNROLL
#define UNROLL  // its vectors are loops already
namespace qjax::plain {
#include "convert.h"
#include "lanes.h"
#include QJAX_BODY
}  // namespace qjax::plain
#undef UNROLL
#define UNROLL QJAX_UNROLL
