// The Viterbi search behind trellis-coded quantization, as an XLA FFI handler.
//
// A tile of 256 numbers becomes a walk through 2^16 states, of which each step keeps the
// low 16 - K bits and appends K: of 2^K states that lead to the same u = low bits, only
// the cheapest survives, so costs are kept per u. Numbers and values are integers that
// make every squared difference a multiple of 2^K; the low K bits of a cost hold the high
// bits p of the state it belongs to. A minimum of costs then finds the lowest p among
// equals as well, which is the only state that is stored.

#include <algorithm>
#include <string>

#include "call.h"
#include "ffi.h"
#include "isa.h"
#include "operands.h"
#include "team.h"

namespace qjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kSteps = 256;
constexpr int64_t kStates = 1 << 16;
constexpr int32_t kNever = 1 << 30;
constexpr int64_t kRenew = 8;  // steps after which the least cost is subtracted

ffi::Error bad(const std::string& what) {
  return ffi::Error::InvalidArgument("qjax native trellis: " + what);
}

// One step for all u: costs `before` to `after`, survivors' p to `back`.
using Step = void (*)(const int32_t* values, int32_t x, const int32_t* before,
                      int32_t* after, uint8_t* back);

template <int K>
void plain_step(const int32_t* values, int32_t x, const int32_t* before, int32_t* after,
                uint8_t* back) {
  constexpr int64_t kU = kStates >> K, kSame = 1 << K;
  for (int64_t v = 0; v < kU / kSame; ++v) {
    int32_t best[kSame];
    for (int64_t p = 0; p < kSame; ++p) {
      const int32_t cost = before[p * (kU / kSame) + v];
      const int32_t* value = values + p * kU + v * kSame;
      for (int64_t i = 0; i < kSame; ++i) {
        const int32_t d = x - int16_t(value[i]), c = cost + d * d;
        best[i] = p == 0 || c < best[i] ? c : best[i];
      }
    }
    for (int64_t i = 0; i < kSame; ++i) {
      const int64_t u = v * kSame + i;
      back[u] = best[i] & (kSame - 1);
      after[u] = (best[i] & ~int32_t(kSame - 1)) | int32_t(u / (kU / kSame));
    }
  }
}

#ifdef QJAX_X86
QJAX_TARGET("avx2")
// The costs of the predecessors of eight states from `u` on: each serves 2^K of them.
template <int K>
static inline __m256i spread(const int32_t* before, int64_t u) {
  const int32_t* at = before + (u >> K);
  if (K >= 3) return _mm256_set1_epi32(*at);
  if (K == 2) {
    int64_t two;
    std::memcpy(&two, at, 8);
    const __m256i pick = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_castps_si256(
        _mm256_permutevar_ps(_mm256_castsi256_ps(_mm256_set1_epi64x(two)), pick));
  }
  const __m256i pick = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(four), pick);
}

template <int K>
void avx2_step(const int32_t* values, int32_t x, const int32_t* before, int32_t* after,
               uint8_t* back) {
  constexpr int64_t kU = kStates >> K, kSame = 1 << K, kRuns = kU / kSame, kWide = 32;
  const __m256i at = _mm256_set1_epi32(x & 0xFFFF);
  const __m256i low = _mm256_set1_epi32(kSame - 1);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t u = 0; u < kU; u += kWide) {
    __m256i best[4];
    for (int j = 0; j < 4; ++j) best[j] = _mm256_set1_epi32(INT32_MAX);
    for (int64_t p = 0; p < kSame; ++p) {
      const int32_t* value = values + p * kU + u;
      for (int j = 0; j < 4; ++j) {
        const __m256i cost = spread<K>(before + p * kRuns, u + 8 * j);
        // 16-bit halves: the high ones are zero.
        const __m256i d = _mm256_sub_epi16(
            at, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + 8 * j)));
        best[j] = _mm256_min_epi32(best[j], _mm256_add_epi32(cost, _mm256_madd_epi16(d, d)));
      }
    }
    __m256i from[4];
    for (int j = 0; j < 4; ++j) {
      from[j] = _mm256_and_si256(best[j], low);
      alignas(32) int32_t mine[8];
      for (int i = 0; i < 8; ++i) mine[i] = int32_t((u + 8 * j + i) / kRuns);
      const __m256i own = kRuns >= 8
                              ? _mm256_set1_epi32(mine[0])
                              : _mm256_load_si256(reinterpret_cast<const __m256i*>(mine));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(after + u + 8 * j),
                          _mm256_or_si256(_mm256_andnot_si256(low, best[j]), own));
    }
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(from[0], from[1]),
                                              _mm256_packus_epi32(from[2], from[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(back + u),
                        _mm256_permutevar8x32_epi32(bytes, order));
  }
}
QJAX_TARGET_END
#endif

template <int K>
Step step_of() {
#ifdef QJAX_X86
  if (std::string(engine().name) != "plain") return avx2_step<K>;
#endif
  return plain_step<K>;
}

Step step_of(int64_t bits) {
  static constexpr Step (*kAll[])() = {step_of<1>, step_of<2>, step_of<3>, step_of<4>,
                                       step_of<5>, step_of<6>, step_of<7>, step_of<8>};
  return kAll[bits - 1]();
}

// The search in one tile.
struct Search {
  const int32_t* values;
  Step step;
  int bits;
  int32_t* cost;   // two arrays, one entry per u
  uint8_t* back;   // one entry per step and u

  int64_t size() const { return kStates >> bits; }
  int32_t high(int64_t u) const { return int32_t(u >> (16 - 2 * bits)); }

  // Costs before the first step: all zero, or only `only` is possible.
  void start(int64_t only) {
    for (int64_t u = 0; u < size(); ++u) {
      cost[u] = (only < 0 || u == only ? 0 : kNever) | high(u);
    }
  }

  // Steps over `count` numbers; survivors go to rows of `back` from `row` on.
  void forward(const int16_t* x, int64_t count, int64_t row) {
    for (int64_t t = 0; t < count; ++t) {
      int32_t* other = cost == first ? first + size() : first;
      step(values, x[t], cost, other, back + (row + t) * size());
      cost = other;
      if ((row + t) % kRenew == kRenew - 1) renew();
    }
  }

  void renew() {
    const int32_t mask = ~((1 << bits) - 1);
    int32_t least = INT32_MAX;
    for (int64_t u = 0; u < size(); ++u) least = std::min(least, cost[u]);
    least &= mask;
    for (int64_t u = 0; u < size(); ++u) cost[u] -= least;
  }

  int64_t cheapest() const {
    const int32_t mask = ~((1 << bits) - 1);
    int64_t best = 0;
    for (int64_t u = 1; u < size(); ++u) {
      if ((cost[u] & mask) < (cost[best] & mask)) best = u;
    }
    return best;
  }

  // The state at a row of `back` whose low bits are `u`.
  int64_t state(int64_t row, int64_t u) const {
    return (int64_t(back[row * size() + u]) << (16 - bits)) | u;
  }

  int32_t* first;
};

// The states of the best walk that ends in the state it starts from, more or less: the
// low bits of that state are those on the best walk around the seam.
void walk(Search s, const int16_t* x, int64_t around, uint16_t* states) {
  s.start(-1);
  s.forward(x + kSteps - around, around, 0);
  s.forward(x, around, around);
  int64_t u = s.cheapest();
  for (int64_t t = 2 * around - 1; t >= around; --t) u = s.state(t, u) >> s.bits;
  s.start(u);
  s.forward(x, kSteps, 0);
  for (int64_t t = kSteps - 1; t >= 0; --t) {
    const int64_t state = s.state(t, u);
    states[t] = uint16_t(state);
    u = state >> s.bits;
  }
}

ffi::Error trellis(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                   ffi::Result<ffi::AnyBuffer> states, int64_t bits, int64_t around) {
  if (x.element_type() != ffi::DataType::S16 || x.dimensions().size() != 2 ||
      x.dimensions()[1] != kSteps) {
    return bad("x has another shape or type than int16 [tiles, 256]");
  }
  const int64_t tiles = x.dimensions()[0];
  if (values.element_type() != ffi::DataType::U32 || !shaped(values, {kStates})) {
    return bad("values have another shape or type than uint32 [65536]");
  }
  if (states->element_type() != ffi::DataType::U16 || !shaped(*states, {tiles, kSteps})) {
    return bad("the result has another shape or type than uint16 [tiles, 256]");
  }
  if (bits < 1 || bits > 8 || around < 1 || around > kSteps / 2) {
    return bad("bits or the length of the seam is out of range");
  }
  auto* numbers = static_cast<const int16_t*>(x.untyped_data());
  auto* out = static_cast<uint16_t*>(states->untyped_data());
  Search search{static_cast<const int32_t*>(values.untyped_data()), step_of(bits),
                int(bits), nullptr, nullptr, nullptr};
  const bool good = parallel(pool, pool.num_threads(), tiles, [&](int64_t i) {
    static thread_local Buffer costs, backs;
    Search s = search;
    s.first = s.cost = costs.get<int32_t>(2 * s.size());
    s.back = backs.get<uint8_t>(kSteps * s.size());
    walk(s, numbers + i * kSteps, around, out + i * kSteps);
  });
  if (good) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax native trellis: no memory");
}

}  // namespace
}  // namespace qjax

QJAX_EXPORT XLA_FFI_Error* qjax_trellis(XLA_FFI_CallFrame*);

using Any = xla::ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_trellis, qjax::trellis,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Any>()   // x
                                  .Arg<Any>()   // values of states
                                  .Ret<Any>()   // states
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("around"));
