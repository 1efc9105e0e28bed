// The engines there are, one per source file `isa_*.cc` and instruction set.

#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "attention_call.h"
#include "isa.h"

#define QJAX_ENGINE(isa) \
  {#isa,         isa::W,       0,              isa::kWords ? 4 : 8,                  \
   isa::prepare, isa::forward, isa::transposed, isa::attend, \
   isa::attend_self}
#define QJAX_TILED(name, isa, planes)                                \
  {name,         isa::W,             planes,          8,                         \
   isa::prepare, isa::forward_tiles, isa::transposed, isa::attend, \
   isa::attend_self}

namespace qjax {

extern const Engine kAmx, kAvx512, kAvxVnni, kAvx2, kNeon, kPlain, kAmxEmulated;

}  // namespace qjax
