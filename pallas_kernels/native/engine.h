// The products, written once over the primitives of lanes.h and included once per
// instruction set. Both engines decode a panel (one block of W by one strip of columns)
// into the first-level cache and multiply it by all rows of x; integer dot products leave
// execution units free, so the first rows of x are multiplied while a panel is decoded:
//
// * integer: panel of bytes, four neighbouring rows of W per dword; x is fixed point,
//   x ~ step * (256 high + low) with step = absmax of the block / 32512, or int8 rows
//   with one step; sums inside a block are exact 32-bit integers;
// * float: panel of float32 values, x as it is.
//
//   y[m, j] = sum over blocks of scale[g, j] * (x . code - zero[g, j] * sum of x)

template <int S, bool BYTES, class V>
INLINE V shift(V v) {
  if constexpr (BYTES) {
    return bshift<S>(v);
  } else {
    return ishift<S>(v);
  }
}

template <bool BYTES, class V>
INLINE V mask(V v, int bits) {
  if constexpr (BYTES) {
    return band(v, bset(bits));
  } else {
    return iand(v, iset(bits));
  }
}

// Field of `WIDTH` bits of row `J`, moved to bit `AT` of the code. Its byte rows begin
// at `FIRST`.
template <int WIDTH, int FIRST, int AT, int J, bool BYTES, class V>
INLINE V field(const V* rows, int step) {
  constexpr int kPer = 8 / WIDTH;
  V v = rows[(FIRST + J / kPer) * step];
  return mask<BYTES>(shift<J % kPer * WIDTH - AT, BYTES>(v), ((1 << WIDTH) - 1) << AT);
}

template <bool BYTES, class V>
INLINE V join(V a, V b) {
  if constexpr (BYTES) {
    return bor(a, b);
  } else {
    return ior(a, b);
  }
}

// Code of row `J` of a unit whose byte rows are `rows[0], rows[step], ...`.
template <int BITS, int J, bool BYTES, class V>
INLINE V code(const V* rows, int step) {
  if constexpr (BITS == 8) {
    return rows[0];
  } else if constexpr (BITS == 1 || BITS == 2 || BITS == 4) {
    return field<BITS, 0, 0, J, BYTES>(rows, step);
  } else if constexpr (BITS == 3) {
    return join<BYTES>(field<2, 0, 0, J, BYTES>(rows, step),
                       field<1, 2, 2, J, BYTES>(rows, step));
  } else {
    V v = field<4, 0, 0, J, BYTES>(rows, step);
    if constexpr (BITS == 5) v = join<BYTES>(v, field<1, 4, 4, J, BYTES>(rows, step));
    if constexpr (BITS >= 6) v = join<BYTES>(v, field<2, 4, 4, J, BYTES>(rows, step));
    if constexpr (BITS == 7) v = join<BYTES>(v, field<1, 6, 6, J, BYTES>(rows, step));
    return v;
  }
}

template <int BITS>
struct Unit {
  static constexpr bool kFields = BITS == 3 || BITS > 4;
  static constexpr int kRows = BITS == 8 ? 1 : (kFields ? BITS : 1);
  static constexpr int kPer = BITS == 8 ? 1 : (kFields ? 8 : 8 / BITS);
};

alignas(64) static const uint8_t kZeros[64] = {};

// Bytes of four units that are stored in the order of a panel.
template <int BITS>
constexpr int64_t kOrdered = Unit<BITS>::kRows * 4 * kStrip;

// How far ahead of its use such a unit is asked for.
constexpr int64_t kDistance = 1024;

// Four units from `p` as interleaved byte rows: ORDERED, stored so; else byte rows are
// `stride` apart and units from `left` on do not exist.
template <int BITS, bool ORDERED>
INLINE void load_units(const uint8_t* p, int64_t stride, int64_t left, B turn,
                       B (*rows)[4]) {
  constexpr int R = Unit<BITS>::kRows;
  UNROLL for (int r = 0; r < R; ++r) {
    if constexpr (ORDERED) {
      UNROLL for (int t = 0; t < 4; ++t) {
        const uint8_t* from = p + r * 4 * kStrip + t * W;
        if (t * W % 64 == 0) PREFETCH(from + kDistance);
        rows[r][t] = load(from);
        if constexpr (BITS == 8) rows[r][t] = bxor(rows[r][t], turn);
      }
      continue;
    }
    B in[4];
    UNROLL for (int b = 0; b < 4; ++b) {
      in[b] = load(b < left ? p + (b * R + r) * stride : kZeros);
      if constexpr (BITS == 8) in[b] = bxor(in[b], turn);
    }
    interleave(in[0], in[1], in[2], in[3], rows[r]);
  }
}

// Lines to ask memory for: of some rows, `kSpan` bytes each. A product asks for `rate` of
// them per dword of x and not for all at once, or it would wait for free miss buffers.
constexpr int64_t kSpan = 512;

struct Ahead {
  const uint8_t* p;
  int64_t stride, lines, rate;
};

template <bool FAR = false>
INLINE void ask(Ahead& a, int64_t count) {
  for (; count > 0 && a.lines > 0; --count) {
    FAR ? PREFETCH_FAR(a.p) : PREFETCH(a.p);
    a.p += --a.lines % (kSpan / 64) ? 64 : a.stride - (kSpan - 64);
  }
}

// Quantized activations of some rows and one block, and what turns sums into results.
struct Factors {
  const int32_t* x;
  int64_t x_stride;
  const float *step, *sum;
  int64_t step_stride;
};

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

template <int MR>
INLINE void clear(F (*acc)[4]) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int t = 0; t < 4; ++t) acc[r][t] = fset(0);
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

enum class Value { table, cast, gather, e4m3, e5m2 };

template <int BITS, Value V, int J>
INLINE F value(const I* rows, const Table& small, const float* large) {
  if constexpr (V == Value::table) {
    if constexpr (kWraps && (BITS == 1 || BITS == 2 || BITS == 4)) {
      return lookup(small, ishift<J * BITS>(rows[0]));
    } else {
      return lookup(small, code<BITS, J, false>(rows, 1));
    }
  } else if constexpr (V == Value::gather) {
    return gather(large, code<BITS, J, false>(rows, 1));
  } else {
    return icvt(code<BITS, J, false>(rows, 1));
  }
}

// Vector `t` of a unit: its float values, row by row.
template <int BITS, Value V, int... J>
INLINE void load_values(const uint8_t* p, int64_t stride, const Call& c,
                        const Table& small, F* out, std::integer_sequence<int, J...>) {
  constexpr int R = Unit<BITS>::kRows;
  if constexpr (V == Value::e4m3) {
    out[0] = e4m3(p);
  } else if constexpr (V == Value::e5m2) {
    out[0] = e5m2(p);
  } else {
    I rows[R];
    UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* from = p + r * stride;
      if constexpr (V == Value::cast && BITS == 8) {
        rows[r] = c.signed_codes ? widen_signed(from) : widen(from);
      } else {
        rows[r] = widen(from);
      }
    }
    ((out[J] = value<BITS, V, J>(rows, small, c.table)), ...);
  }
}

// Byte rows to a panel [rows][4][L] of float values.
template <int BITS, Value V>
static void decode_values(const uint8_t* p, int64_t stride, int64_t units, const Call& c,
                          float* panel) {
  constexpr int R = Unit<BITS>::kRows, PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const Table small = table(c.table);
  for (; units > 0; --units, p += R * stride, panel += PER * 4 * L) {
    UNROLL for (int t = 0; t < 4; ++t) {
      F out[PER];
      load_values<BITS, V>(p + t * L, stride, c, small, out, each);
      UNROLL for (int j = 0; j < PER; ++j) fstore(panel + (j * 4 + t) * L, out[j]);
    }
  }
}

// One row of x times byte rows, without a panel; `rows` of x count.
template <int BITS, Value V>
static void dot_values(const uint8_t* p, int64_t stride, int64_t rows, const Call& c,
                       const float* x, const float* sum, const F* s, const F* z,
                       float* y) {
  constexpr int R = Unit<BITS>::kRows, PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const Table small = table(c.table);
  F acc[2][4];
  clear<2>(acc);
  // Two turns of the loop at once keep more sums in flight than an addition takes.
  for (; rows >= 2 * PER; rows -= 2 * PER, x += 2 * PER) {
    UNROLL for (int u = 0; u < 2; ++u, p += R * stride) {
      UNROLL for (int t = 0; t < 4; ++t) {
        F out[PER];
        load_values<BITS, V>(p + t * L, stride, c, small, out, each);
        UNROLL for (int j = 0; j < PER; ++j) {
          acc[(j + u) % 2][t] = fma(fset(x[u * PER + j]), out[j], acc[(j + u) % 2][t]);
        }
      }
    }
  }
  for (; rows > 0; rows -= PER, x += PER, p += R * stride) {
    UNROLL for (int t = 0; t < 4; ++t) {
      F out[PER];
      load_values<BITS, V>(p + t * L, stride, c, small, out, each);
      UNROLL for (int j = 0; j < PER; ++j) {
        if (j < rows) acc[j % 2][t] = fma(fset(x[j]), out[j], acc[j % 2][t]);
      }
    }
  }
  const F total = fset(*sum);
  UNROLL for (int t = 0; t < 4; ++t) {
    F v = fnma(z[t], total, fadd(acc[0][t], acc[1][t]));
    fstore(y + t * L, fma(s[t], v, fload(y + t * L)));
  }
}

template <int MR>
static void multiply_values(const float* panel, int64_t rows, const float* x,
                            int64_t x_stride, const float* sum, int64_t sum_stride,
                            const F* s, const F* z, float* y, int64_t y_stride) {
  F acc[MR][4];
  clear<MR>(acc);
  for (int64_t i = 0; i < rows; ++i, panel += 4 * L) {
    F w[4] = {fload(panel), fload(panel + L), fload(panel + 2 * L), fload(panel + 3 * L)};
    UNROLL for (int r = 0; r < MR; ++r) {
      F v = fset(x[r * x_stride + i]);
      UNROLL for (int t = 0; t < 4; ++t) acc[r][t] = fma(v, w[t], acc[r][t]);
    }
  }
  UNROLL for (int r = 0; r < MR; ++r) {
    F total = fset(sum[r * sum_stride]);
    UNROLL for (int t = 0; t < 4; ++t) {
      float* to = y + r * y_stride + t * L;
      fstore(to, fma(s[t], fnma(z[t], total, acc[r][t]), fload(to)));
    }
  }
}

using MultiplyCodes = void (*)(const uint8_t*, int64_t, Ahead&, const Factors&,
                               const F*, const F*, float*, int64_t);
using MultiplyPacked = void (*)(const uint8_t*, int64_t, int64_t, int, Ahead&,
                                const Factors&, const F*, const F*, uint8_t*, float*,
                                int64_t);
using DecodeValues = void (*)(const uint8_t*, int64_t, int64_t, const Call&, float*);
using DotValues = void (*)(const uint8_t*, int64_t, int64_t, const Call&, const float*,
                           const float*, const F*, const F*, float*);
using MultiplyValues = void (*)(const float*, int64_t, const float*, int64_t,
                                const float*, int64_t, const F*, const F*, float*,
                                int64_t);

// Rows of x that are multiplied at once, as many as there are registers for sums.
template <int H>
constexpr int kTile = H == 2 ? (kRows + 1) / 2 : kRows;

// The same where codes are unpacked on the way.
template <int H>
constexpr int kFirst = kTile<H> < 2 ? 1 : 2;

template <int N, int MOST>
constexpr int kAtMost = N < MOST ? N : MOST;

template <int H, int MR, bool KEEP, bool ORDERED>
static MultiplyPacked packed_multiplier(int bits) {
  constexpr MultiplyPacked all[] = {
      multiply_packed<1, H, MR, KEEP, ORDERED>, multiply_packed<2, H, MR, KEEP, ORDERED>,
      multiply_packed<3, H, MR, KEEP, ORDERED>, multiply_packed<4, H, MR, KEEP, ORDERED>,
      multiply_packed<5, H, MR, KEEP, ORDERED>, multiply_packed<6, H, MR, KEEP, ORDERED>,
      multiply_packed<7, H, MR, KEEP, ORDERED>, multiply_packed<8, H, MR, KEEP, ORDERED>};
  return all[bits - 1];
}

template <int H>
static MultiplyPacked packed_multiplier(const Call& c, bool one) {
  if (c.strips) return packed_multiplier<H, kFirst<H>, true, true>(c.bits);
  return one ? packed_multiplier<H, 1, false, false>(c.bits)
             : packed_multiplier<H, kFirst<H>, true, false>(c.bits);
}

static MultiplyPacked packed_multiplier(const Call& c, bool one) {
  return c.halves == 2 ? packed_multiplier<2>(c, one) : packed_multiplier<1>(c, one);
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

struct ValueCode {
  DecodeValues decode;
  DotValues dot;
};

template <int BITS, Value V>
constexpr ValueCode kValueCode = {decode_values<BITS, V>, dot_values<BITS, V>};

static ValueCode value_code(const Call& c) {
  constexpr ValueCode low[] = {kValueCode<1, Value::table>, kValueCode<2, Value::table>,
                               kValueCode<3, Value::table>, kValueCode<4, Value::table>};
  constexpr ValueCode cast[] = {kValueCode<5, Value::cast>, kValueCode<6, Value::cast>,
                                kValueCode<7, Value::cast>, kValueCode<8, Value::cast>};
  constexpr ValueCode wide[] = {
      kValueCode<5, Value::gather>, kValueCode<6, Value::gather>,
      kValueCode<7, Value::gather>, kValueCode<8, Value::gather>};
  if (c.kind == Kind::e4m3) return kValueCode<8, Value::e4m3>;
  if (c.kind == Kind::e5m2) return kValueCode<8, Value::e5m2>;
  if (c.bits <= 4) return low[c.bits - 1];
  return c.kind == Kind::integer ? cast[c.bits - 5] : wide[c.bits - 5];
}

static MultiplyValues values_multiplier(int rows) {
  constexpr MultiplyValues all[] = {
      multiply_values<kAtMost<1, kRows>>, multiply_values<kAtMost<2, kRows>>,
      multiply_values<kAtMost<3, kRows>>, multiply_values<kAtMost<4, kRows>>,
      multiply_values<kAtMost<5, kRows>>, multiply_values<kAtMost<6, kRows>>};
  return all[rows - 1];
}

// A strip's worth of numbers: where they are, or converted and padded in `line`.
INLINE const float* strip_floats(const Array& a, int64_t first, int64_t count,
                                 float* line) {
  if (a.type == Type::f32 && count == W) {
    return static_cast<const float*>(a.data) + first;
  }
  if (count < W) std::memset(line, 0, W * sizeof(float));
  to_floats(a, first, count, line);
  return line;
}

// A strip's worth of stored numbers from element `first` on.
INLINE void strip_vectors(const Array& a, int64_t first, F* out) {
  alignas(64) float line[W];
  auto* words = static_cast<const uint16_t*>(a.data) + first;
  auto* floats = static_cast<const float*>(a.data) + first;
  if (a.type == Type::f16) {
    UNROLL for (int t = 0; t < 4; ++t) out[t] = load_f16(words + t * L);
  } else if (a.type == Type::bf16) {
    UNROLL for (int t = 0; t < 4; ++t) out[t] = load_bf16(words + t * L);
  } else {
    if (a.type != Type::f32) {
      to_floats(a, first, W, line);
      floats = line;
    }
    UNROLL for (int t = 0; t < 4; ++t) out[t] = fload(floats + t * L);
  }
}

// Scales and zero-points of one group and strip; columns beyond the last have scale 0,
// or what is stored for them.
INLINE void load_scales(const Call& c, int64_t group, int64_t column, int64_t count,
                        float extra, bool weave, F* s, F* z) {
  alignas(64) float scale[W], zero[W];
  const float unit = c.kind == Kind::e4m3 ? kE4m3 : 1.f;
  const int64_t at = c.scale_at(group, column);
  if (c.strips) count = W;
  const float* from = strip_floats(c.scale, at, count, scale);
  for (int t = 0; t < 4; ++t) {
    s[t] = fmul(fset(unit), weave ? woven(from, t) : fload(from + t * L));
  }
  if (c.zero.type == Type::none) {
    for (int t = 0; t < 4; ++t) z[t] = fset(extra / unit);
    return;
  }
  from = strip_floats(c.zero, at, count, zero);
  for (int t = 0; t < 4; ++t) {
    F v = fadd(fset(extra), weave ? woven(from, t) : fload(from + t * L));
    z[t] = fmul(v, fset(1 / unit));
  }
}

// Copies the byte rows of a strip that the matrix cuts off to whole strips.
static void pad_strip(const uint8_t* p, int64_t stride, int64_t count, int64_t rows,
                      uint8_t* out) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(out + i * W, p + i * stride, count);
    std::memset(out + i * W + count, 0, W - count);
  }
}

// What 8-bit codes are turned into for `dot` (xor), and what that adds to a code.
static int flip_of(const Call& c) {
  return c.bits == 8 && c.signed_codes != kSigned ? 0x80 : 0;
}

static float shift_of(const Call& c) {
  return flip_of(c) ? (kSigned ? -128.f : 128.f) : 0.f;
}

// A strip of packed rows: where it is, padded when the matrix cuts it off.
struct Strip {
  const uint8_t* p;
  int64_t stride;
};

static Strip strip_of(const Call& c, const Block& block, int64_t column, int64_t count,
                      uint8_t* edge) {
  const uint8_t* p = c.codes_at(block.packed, column);
  if (c.strips) return {p, kStrip};
  if (count == W) return {p, c.n};
  pad_strip(p, c.n, count, block.units * c.unit_rows, edge);
  return {edge, W};
}

// What `forward` reads `kSpan` bytes of a row later: one strip of several asks for whole
// spans of some of the rows, because memory likes neighbouring lines at once.
INLINE Ahead ahead_of(const Call& c, size_t b, int64_t column, int64_t c0, int64_t c1) {
  constexpr int64_t kStrips = kSpan / W;
  const int64_t in_span = (column - c0) % kSpan;
  int64_t next = column - in_span + kSpan;
  if (next >= c1) {
    if (++b == c.blocks.size()) return {nullptr, 0, 0, 0};
    next = c0;
  }
  const Block& block = c.blocks[b];
  const int64_t rows = block.units * c.unit_rows, share = (rows + kStrips - 1) / kStrips;
  const int64_t first = in_span / W * share;
  const int64_t last = first + share < rows ? first + share : rows;
  const uint8_t* p = c.codes + (block.packed + first) * c.n + next;
  return {p, c.n, (last - first) * (kSpan / 64), 0};
}

// One row of x times a stored strip: the columns from `column` on, to y [4 L].
template <int BITS, int H>
static void dot_strip(const Call& c, int64_t column, float* y) {
  constexpr int PER = Unit<BITS>::kPer;
  constexpr auto each = std::make_integer_sequence<int, PER>();
  const B turn = bset(flip_of(c));
  const F extra = fset(c.offset + shift_of(c));
  const float *step = c.step, *sum = c.sum;
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
    F s[4], z[4] = {extra, extra, extra, extra};
    const int64_t at = c.scale_at(block.group, column);
    strip_vectors(c.scale, at, s);
    if (c.zero.type != Type::none) {
      strip_vectors(c.zero, at, z);
      UNROLL for (int t = 0; t < 4; ++t) z[t] = fadd(z[t], extra);
    }
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

static void finish(const Call& c, const float* y, int64_t y_stride, int64_t m0, int64_t m1,
                   int64_t c0, int64_t c1, bool weave) {
  alignas(64) float line[W], bias[W];
  for (int64_t column = c0; column < c1; column += W) {
    int64_t count = c1 - column < W ? c1 - column : W;
    if (c.bias.type != Type::none) to_floats(c.bias, column, count, bias);
    for (int64_t r = m0; r < m1; ++r) {
      const float* from = y + (r - m0) * y_stride + column - c0;
      for (int t = 0; t < 4; ++t) {
        for (int l = 0; l < L / 4; ++l) {
          std::memcpy(line + (weave ? 16 * l + 4 * t : t * L + 4 * l),
                      from + t * L + 4 * l, 16);
        }
      }
      if (c.bias.type != Type::none) {
        for (int i = 0; i < count; ++i) line[i] += bias[i];
      }
      from_floats(line, count, c.y_type, c.y, r * c.n + column);
    }
  }
}

// Quantized x of a block from row `r` on.
INLINE Factors factors_of(const Call& c, const Block& block, int64_t r) {
  const int64_t blocks = c.blocks.size(), at = r * blocks + (&block - c.blocks.data());
  return {c.xq_of(block, r), block.dwords * c.halves, c.step + at, c.sum + at, blocks};
}

// One strip and block of `forward`: y [rows of x][4 L] += x W.
INLINE void add_strip(const Call& c, const Strip& strip, Ahead ahead, const Block& block,
                      int64_t m0, int64_t m1, const F* s, const F* z, uint8_t* panel,
                      float* y, int64_t y_stride) {
  if (c.integer_engine) {
    const bool one = m1 - m0 == 1;
    const int tile = c.halves == 2 ? kTile<2> : kTile<1>;
    int64_t n = one ? 1 : c.halves == 2 ? kFirst<2> : kFirst<1>;
    const int64_t turns = (1 + (m1 - m0 - n + tile - 1) / tile) * block.dwords;
    ahead.rate = (ahead.lines + turns - 1) / turns;
    for (int64_t r = m0; r < m1; r += n, y += n * y_stride) {
      if (r > m0) n = m1 - r < tile ? m1 - r : tile;
      const Factors f = factors_of(c, block, r);
      if (r == m0) {
        packed_multiplier(c, one)(strip.p, strip.stride, block.units, flip_of(c), ahead, f,
                                  s, z, panel, y, y_stride);
      } else {
        codes_multiplier(c, n)(panel, block.dwords, ahead, f, s, z, y, y_stride);
      }
    }
    return;
  }
  ask(ahead, ahead.lines);
  const int64_t blocks = c.blocks.size(), b = &block - c.blocks.data();
  const ValueCode code = value_code(c);
  const float *x = c.xf + m0 * c.k + block.first, *sum = c.sum + m0 * blocks + b;
  if (m1 - m0 == 1) {
    code.dot(strip.p, strip.stride, block.rows, c, x, sum, s, z, y);
    return;
  }
  auto* floats = reinterpret_cast<float*>(panel);
  code.decode(strip.p, strip.stride, block.units, c, floats);
  for (int64_t r = m0, n; r < m1; r += n, y += n * y_stride) {
    n = m1 - r < kRows ? m1 - r : kRows;
    values_multiplier(n)(floats, block.rows, x, c.k, sum, blocks, s, z, y, y_stride);
    x += n * c.k;
    sum += n * blocks;
  }
}

// Rows [m0, m1) and columns [c0, c1) of the result. `add(strip, ahead, block, s, z, y,
// y_stride)` adds the product of a block and strip to y [m1 - m0][4 L].
template <class Add>
INLINE void forward_strips(const Call& c, int64_t m0, int64_t m1, int64_t c0, int64_t c1,
                           const Add& add) {
  thread_local Buffer results, edges;
  // One line more than needed keeps rows out of one another's cache sets.
  const int64_t width = (c1 - c0 + W - 1) / W * W + 16;
  float* y = results.get<float>((m1 - m0) * width);
  std::memset(y, 0, (m1 - m0) * width * sizeof(float));
  const bool weave = c.integer_engine && !c.strips;
  uint8_t* edge = edges.get<uint8_t>(kBlock * W);
  const float extra = c.offset + (c.integer_engine ? shift_of(c) : 0.f);
  auto one = [&](size_t b, int64_t column) INLINE_LAMBDA {
    const Block& block = c.blocks[b];
    const int64_t count = c1 - column < W ? c1 - column : W;
    const Strip strip = strip_of(c, block, column, count, edge);
    const Ahead ahead = c.strips ? Ahead{} : ahead_of(c, b, column, c0, c1);
    F s[4], z[4];
    load_scales(c, block.group, column, count, extra, weave, s, z);
    add(strip, ahead, block, s, z, y + column - c0, width);
  };
  // Memory likes one strip after the other, many rows of x one block after the other.
  if (c.strips && m1 - m0 <= kFewRows) {
    for (int64_t column = c0; column < c1; column += W) {
      for (size_t b = 0; b < c.blocks.size(); ++b) one(b, column);
    }
  } else {
    for (size_t b = 0; b < c.blocks.size(); ++b) {
      for (int64_t column = c0; column < c1; column += W) one(b, column);
    }
  }
  finish(c, y, width, m0, m1, c0, c1, weave);
}

// `forward` for one row of x and integers in strips.
static void forward_row(const Call& c, int64_t c0, int64_t c1) {
  alignas(64) float y[W];
  const DotStrip dot = c.halves == 2 ? strip_dot<2>(c.bits) : strip_dot<1>(c.bits);
  for (int64_t column = c0; column < c1; column += W) {
    dot(c, column, y);
    finish(c, y, W, 0, 1, column, column + W < c1 ? column + W : c1, false);
  }
}

static void forward(const Call& c, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
  if (c.strips && c.integer_engine && c.m == 1) return forward_row(c, c0, c1);
  thread_local Buffer panels;
  uint8_t* panel =
      panels.get<uint8_t>(c.integer_engine ? (kBlock + 32) * W
                                           : (kFloatBlock + 8) * W * sizeof(float));
  auto add = [&](const Strip& strip, const Ahead& ahead, const Block& block, const F* s,
                 const F* z, float* y, int64_t y_stride) INLINE_LAMBDA {
    add_strip(c, strip, ahead, block, m0, m1, s, z, panel, y, y_stride);
  };
  forward_strips(c, m0, m1, c0, c1, add);
}

static void transposed(const Call& c, int64_t m0, int64_t m1, const Block& block) {
  thread_local Buffer panels, sums, edges;
  float* panel = panels.get<float>((kFloatBlock + 8) * W);
  uint8_t* edge = edges.get<uint8_t>(kBlock * W);
  float* sum = sums.get<float>((m1 - m0) * block.rows * L);
  std::memset(sum, 0, (m1 - m0) * block.rows * L * sizeof(float));
  const DecodeValues values = value_code(c).decode;
  for (int64_t column = 0; column < c.n; column += W) {
    int64_t count = c.n - column < W ? c.n - column : W;
    Strip strip = strip_of(c, block, column, count, edge);
    F s[4], z[4];
    load_scales(c, block.group, column, count, c.offset, false, s, z);
    values(strip.p, strip.stride, block.units, c, panel);
    for (int64_t i = 0; i < block.rows; ++i) {
      for (int t = 0; t < 4; ++t) {
        float* at = panel + (i * 4 + t) * L;
        fstore(at, fmul(s[t], fsub(fload(at), z[t])));
      }
    }
    if (count < W) {  // a table may hold anything for the code of padding
      for (int64_t i = 0; i < block.rows; ++i) {
        std::memset(panel + i * W + count, 0, (W - count) * sizeof(float));
      }
    }
    for (int64_t r = m0; r < m1; ++r) {
      alignas(64) float line[W];
      const float* x = c.xf + r * c.n + column;
      if (count < W) {
        std::memset(line, 0, sizeof line);
        std::memcpy(line, x, count * sizeof(float));
        x = line;
      }
      F v[4] = {fload(x), fload(x + L), fload(x + 2 * L), fload(x + 3 * L)};
      float* to = sum + (r - m0) * block.rows * L;
      const float* w = panel;
      for (int64_t i = 0; i < block.rows; ++i, w += 4 * L, to += L) {
        F a = fma(v[0], fload(w), fload(to));
        F b = fmul(v[1], fload(w + L));
        a = fma(v[2], fload(w + 2 * L), a);
        b = fma(v[3], fload(w + 3 * L), b);
        fstore(to, fadd(a, b));
      }
    }
  }
  float line[kFloatBlock], bias[kFloatBlock];
  if (c.bias.type != Type::none) to_floats(c.bias, block.first, block.rows, bias);
  for (int64_t r = m0; r < m1; ++r) {
    for (int64_t i = 0; i < block.rows; ++i) {
      line[i] = fsum(fload(sum + ((r - m0) * block.rows + i) * L));
      if (c.bias.type != Type::none) line[i] += bias[i];
    }
    from_floats(line, block.rows, c.y_type, c.y, r * c.k + block.first);
  }
}

// Rows `[groups][4 units][PER]` of fixed-point numbers as dwords `[groups][PER]` of their
// bytes: of high halves to `high`, of low ones to `low`, `skip` dwords apart. Returns the
// sum.
template <int PER>
static int32_t place(const int32_t* q, int64_t groups, int64_t skip, int32_t* high,
                     int32_t* low) {
  int32_t total = 0;
  for (; groups > 0; --groups, q += 4 * PER) {
    UNROLL for (int j = 0; j < PER; ++j, high += skip, low += skip) {
      uint32_t upper = 0, lower = 0;
      UNROLL for (int u = 0; u < 4; ++u) {
        const int32_t v = q[u * PER + j];
        total += v;
        upper |= uint32_t(uint8_t((v + 128) >> 8)) << (8 * u);
        lower |= uint32_t(uint8_t(v)) << (8 * u);
      }
      *high = int32_t(upper);
      *low = int32_t(lower);
    }
  }
  return total;
}

// One block of x in fixed point, bytes in the order of a panel. Returns the sum.
static int32_t place(const Call& c, const Block& block, int32_t* q, int32_t* to) {
  for (int64_t i = block.rows; i < 4 * block.dwords; ++i) q[i] = 0;
  auto run = c.per == 1   ? place<1>
             : c.per == 2 ? place<2>
             : c.per == 4 ? place<4>
                          : place<8>;
  const int64_t groups = block.dwords / c.per, skip = c.planes ? 1 : c.halves;
  // With one half the second write to a place counts.
  int32_t* low = to + (c.halves - 1) * (c.planes ? block.dwords : 1);
  return run(q, groups, skip, to, low);
}

static float absmax(const float* x, int64_t count) {
  uint32_t top = 0;  // of the bits, so that NaN is largest
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = as_bits(x[i]) & 0x7FFFFFFF;
    top = bits > top ? bits : top;
  }
  return as_float(top);
}

// x / step, rounded to even; any number where the step is not one.
static void quantize(const float* x, int64_t count, float step, float limit, int32_t* q) {
  for (int64_t i = 0; i < count; ++i) {
    float v = x[i] / step;
    v = v > limit ? limit : v;
    v = v < -limit ? -limit : v;
    q[i] = static_cast<int32_t>(as_bits(v + 12582912.f) & 0x7FFFFF) - 0x400000;
  }
}

static void prepare(const Call& c, float* xf, int64_t row) {
  thread_local Buffer lines;
  int64_t columns = c.columns(), blocks = c.blocks.size();
  const float* x = static_cast<const float*>(c.x.data) + row * columns;
  if (c.x.type != Type::f32) {
    float* line = xf ? xf + row * columns : lines.get<float>(columns);
    to_floats(c.x, row * columns, columns, line);
    x = line;
  }
  if (c.transpose) return;
  float *step = c.step + row * blocks, *sum = c.sum + row * blocks;
  if (!c.integer_engine) {
    for (int64_t b = 0; b < blocks; ++b) {
      float total = 0;
      for (int64_t i = 0; i < c.blocks[b].rows; ++i) total += x[c.blocks[b].first + i];
      sum[b] = total;
    }
    return;
  }
  int32_t q[kBlock + 32];
  const bool coded = c.x.type == Type::s8;
  float whole = 0;  // step of a row of int8 activations
  if (c.x_scale.type != Type::none) {
    to_floats(c.x_scale, row, 1, &whole);
  } else if (c.halves == 1) {
    whole = absmax(x, columns) / 127.f;
    if (whole < 0x1p-126f) whole = 1;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const Block& block = c.blocks[b];
    const float* from = x + block.first;
    step[b] = c.halves == 1 ? whole : absmax(from, block.rows) / kTop;
    const float by = coded || !(step[b] != 0) ? 1.f : step[b];
    quantize(from, block.rows, by, coded ? 128.f : c.halves == 1 ? 127.f : kTop, q);
    // An infinite or undefined activation makes its row undefined.
    if (!(step[b] < INFINITY)) step[b] = NAN;
    sum[b] = float(place(c, block, q, c.xq_of(block, row)));
  }
}
