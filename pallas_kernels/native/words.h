// Blocks of integer codes times quantized x for AVX2 without VNNI, included by engine.h in
// place of integers.h. Its quickest exact product is of 16-bit numbers in pairs: even and
// odd bytes of a dword of codes become words (H = 2), and x lies in pairs to match, so
// that there is one sum where integers.h has two. int8 x and codes up to 4 bits (H = 1)
// stay bytes, whose products are summed up in words first.

constexpr int kDot = kStrip;  // columns of `dot_strip`
constexpr int kPanel = 2;     // bytes of a code in a panel
constexpr int kTile = 6;      // most rows of x that meet a panel at once
constexpr int kFirst = 2;     // the same while the panel is decoded
constexpr int kBytes = 8;     // dwords of products that words hold: 8 * 2 * 15 * 128 < 2^15

// y += scale * step * (acc - zero * sum) for MR rows and N vectors of y, woven.
template <int MR, int N>
INLINE void add_sums(const I (*acc)[N], const Factors& f, const F* s, const F* z, float* y,
                     int64_t y_stride) {
  UNROLL for (int r = 0; r < MR; ++r) {
    F turn = fset(f.step[r * f.step_stride]), total = fset(f.sum[r * f.step_stride]);
    UNROLL for (int t = 0; t < N; ++t) {
      float* to = y + r * y_stride + t * L;
      F v = fnma(z[t], total, icvt(acc[r][t]));
      fstore(to, fma(fmul(s[t], turn), v, fload(to)));
    }
  }
}

template <int MR, int N>
INLINE void clear(I (*acc)[N]) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int t = 0; t < N; ++t) acc[r][t] = izero();
  }
}

template <int H>
INLINE I dot(I acc, I w, I x) {
  if constexpr (H == 2) return dot_words(acc, w, x);
  return dot_words(acc, byte_products(w, x), iset(0x10001));
}

// Calls `use(i, w)` with what each dword of x meets of vector `rows[0]` of a unit.
template <int BITS, int H, class Use, int... J>
INLINE void each_dword(const B* rows, const Use& use, std::integer_sequence<int, J...>) {
  auto one = [&](auto j) INLINE_LAMBDA {
    constexpr int at = decltype(j)::value;
    const I w = as_dwords(code<BITS, at, true>(rows, 4));
    if constexpr (H == 1) {
      use(at, w);
    } else {
      use(2 * at, even_bytes(w));
      use(2 * at + 1, odd_bytes(w));
    }
  };
  (one(std::integral_constant<int, J>()), ...);
}

// Byte rows at `p`, `stride` apart, times the first MR rows of x, which may be none. With
// KEEP their codes are left as a panel [dwords of x][4][W] for the other rows.
template <int BITS, int H, int MR, bool KEEP, bool ORDERED>
static void multiply_packed(const uint8_t* p, int64_t stride, int64_t units, int flip,
                            Ahead& ahead, const Factors& f, const F* s, const F* z,
                            uint8_t* panel, float* y, int64_t y_stride) {
  constexpr int R = Unit<BITS>::kRows, PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const B turn = bset(flip);
  I acc[MR + 1][4];
  clear<MR>(acc);
  B rows[R][4];
  const int32_t* x = f.x;
  const int64_t step = ORDERED ? kOrdered<BITS> : 4 * R * stride;
  for (; units > 0; units -= 4, p += step, x += PER * H, panel += PER * H * 4 * W) {
    if constexpr (!ORDERED) ask<MR == 0>(ahead, PER * ahead.rate);
    load_units<BITS, ORDERED>(p, stride, units, turn, rows);
    UNROLL for (int t = 0; t < 4; ++t) {
      auto use = [&](int i, I w) INLINE_LAMBDA {
        if constexpr (KEEP) store(panel + (i * 4 + t) * W, w);
        UNROLL for (int r = 0; r < MR; ++r) {
          acc[r][t] = dot<H>(acc[r][t], w, iset(x[r * f.x_stride + i]));
        }
      };
      each_dword<BITS, H>(rows[0] + t, use, each);
    }
  }
  add_sums<MR>(acc, f, s, z, y, y_stride);
}

// A panel times MR rows of x, added to y [MR][4 L]: two vectors at a time, because more
// sums than twelve leave no registers for factors.
template <int H, int MR>
static void multiply_codes(const uint8_t* panel, int64_t dwords, Ahead& ahead,
                           const Factors& f, const F* s, const F* z, float* y,
                           int64_t y_stride) {
  for (int t = 0; t < 4; t += 2) {
    const uint8_t* p = panel + t * W;
    const int32_t* x = f.x;
    I acc[MR][2];
    clear<MR>(acc);
    for (int64_t left = dwords; left > 0; left -= kBytes) {
      const int64_t count = left < kBytes ? left : kBytes;
      ask(ahead, count * ahead.rate);
      I part[MR][2];
      clear<MR>(part);
      for (int64_t i = 0; i < count; ++i, x += H, p += H * 4 * W) {
        UNROLL for (int h = 0; h < H; ++h) {
          const I a = iload(p + h * 4 * W), b = iload(p + h * 4 * W + W);
          UNROLL for (int r = 0; r < MR; ++r) {
            const I v = iset(x[r * f.x_stride + h]);
            if constexpr (H == 2) {
              acc[r][0] = dot_words(acc[r][0], a, v);
              acc[r][1] = dot_words(acc[r][1], b, v);
            } else {
              part[r][0] = dot_bytes(part[r][0], a, v);
              part[r][1] = dot_bytes(part[r][1], b, v);
            }
          }
        }
      }
      if constexpr (H == 2) continue;
      UNROLL for (int r = 0; r < MR; ++r) {
        acc[r][0] = dot_words(acc[r][0], part[r][0], iset(0x10001));
        acc[r][1] = dot_words(acc[r][1], part[r][1], iset(0x10001));
      }
    }
    add_sums<MR>(acc, f, s + t, z + t, y + t * L, y_stride);
  }
}

using MultiplyCodes = void (*)(const uint8_t*, int64_t, Ahead&, const Factors&,
                               const F*, const F*, float*, int64_t);
using MultiplyPacked = void (*)(const uint8_t*, int64_t, int64_t, int, Ahead&,
                                const Factors&, const F*, const F*, uint8_t*, float*,
                                int64_t);

template <int BITS, int MR, bool KEEP, bool ORDERED>
static MultiplyPacked packed_multiplier(int halves) {
  if constexpr (BITS <= 4) {
    if (halves == 1) return multiply_packed<BITS, 1, MR, KEEP, ORDERED>;
  }
  return multiply_packed<BITS, 2, MR, KEEP, ORDERED>;
}

// What decodes a panel; 4 and 8 bits, the usual widths, are multiplied by rows of x then.
template <bool ORDERED>
static MultiplyPacked first_multiplier(int bits, int halves) {
  constexpr decltype(&packed_multiplier<1, 0, true, ORDERED>) all[] = {
      packed_multiplier<1, 0, true, ORDERED>, packed_multiplier<2, 0, true, ORDERED>,
      packed_multiplier<3, 0, true, ORDERED>, packed_multiplier<4, kFirst, true, ORDERED>,
      packed_multiplier<5, 0, true, ORDERED>, packed_multiplier<6, 0, true, ORDERED>,
      packed_multiplier<7, 0, true, ORDERED>, packed_multiplier<8, kFirst, true, ORDERED>};
  return all[bits - 1](halves);
}

static MultiplyPacked one_multiplier(int bits, int halves) {
  constexpr decltype(&packed_multiplier<1, 1, false, false>) all[] = {
      packed_multiplier<1, 1, false, false>, packed_multiplier<2, 1, false, false>,
      packed_multiplier<3, 1, false, false>, packed_multiplier<4, 1, false, false>,
      packed_multiplier<5, 1, false, false>, packed_multiplier<6, 1, false, false>,
      packed_multiplier<7, 1, false, false>, packed_multiplier<8, 1, false, false>};
  return all[bits - 1](halves);
}

template <int H>
static MultiplyCodes codes_multiplier(int64_t rows) {
  constexpr MultiplyCodes all[] = {multiply_codes<H, 1>, multiply_codes<H, 2>,
                                   multiply_codes<H, 3>, multiply_codes<H, 4>,
                                   multiply_codes<H, 5>, multiply_codes<H, 6>};
  return all[rows - 1];
}

// One strip and block of `forward`: y [rows of x][4 L] += x W.
INLINE void add_codes(const Call& c, const Strip& strip, Ahead ahead, const Block& block,
                      int64_t m0, int64_t m1, const F* s, const F* z, uint8_t* panel,
                      float* y, int64_t y_stride) {
  const int64_t rows = m1 - m0;
  int64_t n = rows == 1 ? 1 : c.bits == 4 || c.bits == 8 ? kFirst : 0;
  const int64_t turns = (1 + 2 * ((rows - n + kTile - 1) / kTile)) * block.dwords;
  ahead.rate = (ahead.lines + turns - 1) / turns;
  const MultiplyPacked packed = rows == 1  ? one_multiplier(c.bits, c.halves)
                                : c.strips ? first_multiplier<true>(c.bits, c.halves)
                                           : first_multiplier<false>(c.bits, c.halves);
  packed(strip.p, strip.stride, block.units, flip_of(c), ahead, factors_of(c, block, m0), s,
         z, panel, y, y_stride);
  for (int64_t r = m0 + n; r < m1; r += n) {
    y += n * y_stride;
    n = m1 - r < kTile ? m1 - r : kTile;
    const auto codes = c.halves == 2 ? codes_multiplier<2>(n) : codes_multiplier<1>(n);
    codes(panel, block.dwords, ahead, factors_of(c, block, r), s, z, y, y_stride);
  }
}

// One row of x times a stored strip: the columns from `column` on, to y [kStrip]. Both
// halves at once, or lines of memory would be asked for out of order.
template <int BITS, int H>
static void dot_strip(const Call& c, int64_t column, float* y) {
  constexpr int PER = Unit<BITS>::kPer, R = Unit<BITS>::kRows;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const B turn = bset(flip_of(c));
  const float extra = c.offset + shift_of(c), *step = c.step, *sum = c.sum;
  F total[2][4];
  clear<2>(total);
  for (const Block& block : c.blocks) {
    I acc[2][4];
    clear<2>(acc);
    const uint8_t* p = c.codes_at(block.packed, column);
    const int32_t* x = c.xq_of(block, 0);
    for (int64_t units = block.units; units > 0; units -= 4, x += PER * H) {
      UNROLL for (int u = 0; u < 2; ++u) {
        B rows[R][4];
        load_units<BITS, true>(p + u * 4 * W, kStrip, units, turn, rows);
        UNROLL for (int t = 0; t < 4; ++t) {
          auto use = [&](int i, I w) INLINE_LAMBDA {
            acc[u][t] = dot<H>(acc[u][t], w, iset(x[i]));
          };
          each_dword<BITS, H>(rows[0] + t, use, each);
        }
      }
      p += kOrdered<BITS>;
    }
    const F turned = fset(*step++), all = fset(*sum++);
    UNROLL for (int u = 0; u < 2; ++u) {
      F s[4], z[4];
      stored_scales(c, c.scale_at(block.group, column + u * W), extra, 1.f, s, z);
      UNROLL for (int t = 0; t < 4; ++t) {
        const F v = fnma(z[t], all, icvt(acc[u][t]));
        total[u][t] = fma(fmul(s[t], turned), v, total[u][t]);
      }
    }
  }
  UNROLL for (int t = 0; t < 8; ++t) fstore(y + t * L, total[t / 4][t % 4]);
}

using DotStrip = void (*)(const Call&, int64_t, float*);

template <int BITS>
static DotStrip strip_dot(int halves) {
  if constexpr (BITS <= 4) {
    if (halves == 1) return dot_strip<BITS, 1>;
  }
  return dot_strip<BITS, 2>;
}

static DotStrip strip_dot(const Call& c) {
  constexpr decltype(&strip_dot<1>) all[] = {strip_dot<1>, strip_dot<2>, strip_dot<3>,
                                             strip_dot<4>, strip_dot<5>, strip_dot<6>,
                                             strip_dot<7>, strip_dot<8>};
  return all[c.bits - 1](c.halves);
}
