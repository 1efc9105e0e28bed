// Blocks of integer codes times quantized x, included by engine.h.

constexpr int kDot = W;    // columns of `dot_strip`
constexpr int kPanel = 1;  // bytes of a code in a panel

// y += scale * step * (acc - zero * sum) for MR rows of y, woven.
template <int H, int MR>
INLINE void add_sums(const I (*acc)[H][4], const Factors& f, const F* s, const F* z,
                     float* y, int64_t y_stride) {
  UNROLL for (int r = 0; r < MR; ++r) {
    F turn = fset(f.step[r * f.step_stride]), total = fset(f.sum[r * f.step_stride]);
    UNROLL for (int t = 0; t < 4; ++t) {
      F v;
      if constexpr (H == 2) {
        v = halves(acc[r][0][t], acc[r][1][t]);
      } else {
        v = icvt(acc[r][0][t]);
      }
      float* to = y + r * y_stride + t * L;
      fstore(to, fma(fmul(s[t], turn), fnma(z[t], total, v), fload(to)));
    }
  }
}

template <int BITS, int H, int MR>
INLINE void add_dots(I (*acc)[H][4], const I* w, const int32_t* x, int64_t x_stride) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int h = 0; h < H; ++h) {
      I v = iset(x[r * x_stride + h]);
      UNROLL for (int t = 0; t < 4; ++t) {
        acc[r][h][t] = dot<BITS>(acc[r][h][t], w[t], v);
      }
    }
  }
}

template <int H, int MR>
INLINE void clear(I (*acc)[H][4]) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int t = 0; t < 4; ++t) acc[r][h][t] = izero();
    }
  }
}

// Adds a panel times MR rows of quantized x to y [MR][4 L].
template <int BITS, int H, int MR>
static void multiply_codes(const uint8_t* panel, int64_t dwords, Ahead& ahead,
                           const Factors& f, const F* s, const F* z, float* y,
                           int64_t y_stride) {
  I acc[MR][H][4];
  clear<H, MR>(acc);
  const int32_t* x = f.x;
  for (; dwords > 0; --dwords, panel += 4 * W, x += H) {
    ask(ahead, ahead.rate);
    I w[4] = {iload(panel), iload(panel + W), iload(panel + 2 * W), iload(panel + 3 * W)};
    add_dots<BITS, H, MR>(acc, w, x, f.x_stride);
  }
  add_sums<H, MR>(acc, f, s, z, y, y_stride);
}

template <int BITS, int H, int MR, bool KEEP, int... J>
INLINE void dot_units(const B* rows, const int32_t* x, int64_t x_stride, I (*acc)[H][4],
                      uint8_t* panel, std::integer_sequence<int, J...>) {
  auto one = [&](auto j) INLINE_LAMBDA {
    constexpr int at = decltype(j)::value;
    I w[4];
    UNROLL for (int t = 0; t < 4; ++t) {
      B v = code<BITS, at, true>(rows + t, 4);
      if constexpr (KEEP) store(panel + (at * 4 + t) * W, v);
      w[t] = as_dwords(v);
    }
    add_dots<BITS, H, MR>(acc, w, x + at * H, x_stride);
  };
  (one(std::integral_constant<int, J>()), ...);
}

// The same straight from byte rows at `p`, `stride` apart, for the first rows of x. With
// KEEP the codes are left as a panel [dwords][4][W] for the other rows.
template <int BITS, int H, int MR, bool KEEP, bool ORDERED>
static void multiply_packed(const uint8_t* p, int64_t stride, int64_t units, int flip,
                            Ahead& ahead, const Factors& f, const F* s, const F* z,
                            uint8_t* panel, float* y, int64_t y_stride) {
  constexpr int R = Unit<BITS>::kRows, PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const B turn = bset(flip);
  I acc[MR][H][4];
  clear<H, MR>(acc);
  B rows[R][4];
  const int32_t* x = f.x;
  const int64_t step = ORDERED ? kOrdered<BITS> : 4 * R * stride;
  for (; units > 0; units -= 4, p += step, x += PER * H, panel += PER * 4 * W) {
    if constexpr (!ORDERED) ask(ahead, PER * ahead.rate);
    load_units<BITS, ORDERED>(p, stride, units, turn, rows);
    dot_units<BITS, H, MR, KEEP>(rows[0], x, f.x_stride, acc, panel, each);
  }
  add_sums<H, MR>(acc, f, s, z, y, y_stride);
}

using MultiplyCodes = void (*)(const uint8_t*, int64_t, Ahead&, const Factors&,
                               const F*, const F*, float*, int64_t);
using MultiplyPacked = void (*)(const uint8_t*, int64_t, int64_t, int, Ahead&,
                                const Factors&, const F*, const F*, uint8_t*, float*,
                                int64_t);

// Rows of x that are multiplied at once, as many as there are registers for sums.
template <int H>
constexpr int kTile = H == 2 ? (kRows + 1) / 2 : kRows;

// The same where codes are unpacked on the way.
template <int H>
constexpr int kFirst = kTile<H> < 2 ? 1 : 2;

// One row of x times byte rows.
template <int H>
static MultiplyPacked one_multiplier(int bits) {
  constexpr MultiplyPacked all[] = {
      multiply_packed<1, H, 1, false, false>, multiply_packed<2, H, 1, false, false>,
      multiply_packed<3, H, 1, false, false>, multiply_packed<4, H, 1, false, false>,
      multiply_packed<5, H, 1, false, false>, multiply_packed<6, H, 1, false, false>,
      multiply_packed<7, H, 1, false, false>, multiply_packed<8, H, 1, false, false>};
  return all[bits - 1];
}

// The first rows of x times byte rows that become a panel: for the usual widths, or none.
template <int H>
static MultiplyPacked first_multiplier(const Call& c) {
  constexpr int MR = kFirst<H>;
  if (c.bits == 4) {
    return c.strips ? multiply_packed<4, H, MR, true, true>
                    : multiply_packed<4, H, MR, true, false>;
  }
  if (c.bits == 8) {
    return c.strips ? multiply_packed<8, H, MR, true, true>
                    : multiply_packed<8, H, MR, true, false>;
  }
  return nullptr;
}

static MultiplyPacked packed_multiplier(const Call& c, bool one) {
  if (one) return c.halves == 2 ? one_multiplier<2>(c.bits) : one_multiplier<1>(c.bits);
  return c.halves == 2 ? first_multiplier<2>(c) : first_multiplier<1>(c);
}

template <int BITS, int H>
static MultiplyCodes codes_multiplier(int rows) {
  constexpr int most = kTile<H>;
  constexpr MultiplyCodes all[] = {multiply_codes<BITS, H, kAtMost<1, most>>,
                                   multiply_codes<BITS, H, kAtMost<2, most>>,
                                   multiply_codes<BITS, H, kAtMost<3, most>>,
                                   multiply_codes<BITS, H, kAtMost<4, most>>,
                                   multiply_codes<BITS, H, kAtMost<5, most>>,
                                   multiply_codes<BITS, H, kAtMost<6, most>>};
  return all[rows - 1];
}

static MultiplyCodes codes_multiplier(const Call& c, int rows) {
  if (c.halves == 2) {
    return c.bits == 8 ? codes_multiplier<8, 2>(rows) : codes_multiplier<7, 2>(rows);
  }
  return c.bits == 8 ? codes_multiplier<8, 1>(rows) : codes_multiplier<7, 1>(rows);
}

template <int BITS, int... J>
INLINE void store_units(const B* rows, uint8_t* panel, std::integer_sequence<int, J...>) {
  auto one = [&](auto j) INLINE_LAMBDA {
    constexpr int at = decltype(j)::value;
    UNROLL for (int t = 0; t < 4; ++t) {
      store(panel + (at * 4 + t) * W, code<BITS, at, true>(rows + t, 4));
    }
  };
  (one(std::integral_constant<int, J>()), ...);
}

// Byte rows to a panel [dwords][4][W].
template <int BITS, bool ORDERED>
static void decode_codes(const uint8_t* p, int64_t stride, int64_t units, int flip,
                         Ahead& ahead, uint8_t* panel) {
  constexpr int R = Unit<BITS>::kRows, PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const B turn = bset(flip);
  B rows[R][4];
  const int64_t step = ORDERED ? kOrdered<BITS> : 4 * R * stride;
  for (; units > 0; units -= 4, p += step, panel += PER * 4 * W) {
    if constexpr (!ORDERED) ask<true>(ahead, PER * ahead.rate);
    load_units<BITS, ORDERED>(p, stride, units, turn, rows);
    store_units<BITS>(rows[0], panel, each);
  }
}

using DecodeCodes = void (*)(const uint8_t*, int64_t, int64_t, int, Ahead&, uint8_t*);

template <bool ORDERED>
static DecodeCodes codes_decoder(int bits) {
  constexpr DecodeCodes all[] = {decode_codes<1, ORDERED>, decode_codes<2, ORDERED>,
                                 decode_codes<3, ORDERED>, decode_codes<4, ORDERED>,
                                 decode_codes<5, ORDERED>, decode_codes<6, ORDERED>,
                                 decode_codes<7, ORDERED>, decode_codes<8, ORDERED>};
  return all[bits - 1];
}

static DecodeCodes codes_decoder(const Call& c) {
  return c.strips ? codes_decoder<true>(c.bits) : codes_decoder<false>(c.bits);
}

// One strip and block of `forward`: y [rows of x][4 L] += x W.
INLINE void add_codes(const Call& c, const Strip& strip, Ahead ahead, const Block& block,
                      int64_t m0, int64_t m1, const F* s, const F* z, uint8_t* panel,
                      float* y, int64_t y_stride) {
  const int64_t rows = m1 - m0, tile = c.halves == 2 ? kTile<2> : kTile<1>;
  const MultiplyPacked packed = packed_multiplier(c, rows == 1);
  int64_t n = !packed ? 0 : rows == 1 ? 1 : c.halves == 2 ? kFirst<2> : kFirst<1>;
  const int64_t turns = (1 + (rows - n + tile - 1) / tile) * block.dwords;
  ahead.rate = (ahead.lines + turns - 1) / turns;
  if (packed) {
    packed(strip.p, strip.stride, block.units, flip_of(c), ahead, factors_of(c, block, m0),
           s, z, panel, y, y_stride);
  } else {
    codes_decoder(c)(strip.p, strip.stride, block.units, flip_of(c), ahead, panel);
  }
  for (int64_t r = m0 + n; r < m1; r += n) {
    y += n * y_stride;
    n = m1 - r < tile ? m1 - r : tile;
    codes_multiplier(c, n)(panel, block.dwords, ahead, factors_of(c, block, r), s, z, y,
                           y_stride);
  }
}

// One row of x times a stored strip: the columns from `column` on, to y [4 L].
template <int BITS, int H>
static void dot_strip(const Call& c, int64_t column, float* y) {
  constexpr int PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const B turn = bset(flip_of(c));
  const float extra = c.offset + shift_of(c), *step = c.step, *sum = c.sum;
  F total[4] = {fset(0), fset(0), fset(0), fset(0)};
  for (const Block& block : c.blocks) {
    I acc[1][H][4];
    clear<H, 1>(acc);
    B rows[Unit<BITS>::kRows][4];
    const uint8_t* p = c.codes_at(block.packed, column);
    const int32_t* x = c.xq_of(block, 0);
    for (int64_t units = block.units; units > 0; units -= 4, x += PER * H) {
      load_units<BITS, true>(p, kStrip, units, turn, rows);
      dot_units<BITS, H, 1, false>(rows[0], x, 0, acc, nullptr, each);
      p += kOrdered<BITS>;
    }
    F s[4], z[4];
    stored_scales(c, c.scale_at(block.group, column), extra, 1.f, s, z);
    const F turned = fset(*step++), all = fset(*sum++);
    UNROLL for (int t = 0; t < 4; ++t) {
      F v;
      if constexpr (H == 2) {
        v = halves(acc[0][0][t], acc[0][1][t]);
      } else {
        v = icvt(acc[0][0][t]);
      }
      total[t] = fma(fmul(s[t], turned), fnma(z[t], all, v), total[t]);
    }
  }
  UNROLL for (int t = 0; t < 4; ++t) fstore(y + t * L, total[t]);
}

using DotStrip = void (*)(const Call&, int64_t, float*);

template <int H>
static DotStrip strip_dot(int bits) {
  constexpr DotStrip all[] = {dot_strip<1, H>, dot_strip<2, H>, dot_strip<3, H>,
                              dot_strip<4, H>, dot_strip<5, H>, dot_strip<6, H>,
                              dot_strip<7, H>, dot_strip<8, H>};
  return all[bits - 1];
}

static DotStrip strip_dot(const Call& c) {
  return c.halves == 2 ? strip_dot<2>(c.bits) : strip_dot<1>(c.bits);
}
