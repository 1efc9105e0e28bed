// Products and attention in plain C++, and products in emulated tiles.

#include "engines.h"

#undef UNROLL
#define UNROLL  // its vectors are loops already
namespace qjax::plain {
#include "each_isa.h"
#include "tiles.h"
}  // namespace qjax::plain

namespace qjax {
const Engine kPlain = QJAX_ENGINE(plain);
const Engine kAmxEmulated = QJAX_TILED("amx-emulated", plain, 1);
}  // namespace qjax
