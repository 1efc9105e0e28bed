// Blocks of codes that stand for floats times x, included by engine.h.

template <int MR>
INLINE void clear(F (*acc)[4]) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int t = 0; t < 4; ++t) acc[r][t] = fset(0);
  }
}

enum class Value { table, bf16, cast, gather, e4m3, e5m2 };  // bf16: a table of such

template <Value V>
constexpr bool kByPlanes = kPlanes && (V == Value::table || V == Value::bf16);

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

// Calls `use(j, t, w)` with vector `t` of each row `j` of a unit.
template <int BITS, Value V, class Use, int... J>
INLINE void each_value(const uint8_t* p, int64_t stride, const Call& c,
                       const Table& small, const Use& use,
                       std::integer_sequence<int, J...> each) {
  constexpr int R = Unit<BITS>::kRows, PER = Unit<BITS>::kPer;
  if constexpr (kByPlanes<V>) {
    B rows[R];
    UNROLL for (int r = 0; r < R; ++r) {
      rows[r] = load(p + r * stride);
      rows[r] = unweave(rows[r]);
    }
    auto one = [&](auto j) INLINE_LAMBDA {
      F w[4];
      const B codes = code<BITS, decltype(j)::value, true>(rows, 1);
      lookup(small, codes, w, std::bool_constant<V == Value::bf16>());
      UNROLL for (int t = 0; t < 4; ++t) use(j, t, w[t]);
    };
    (one(std::integral_constant<int, J>()), ...);
  } else {
    UNROLL for (int t = 0; t < 4; ++t) {
      F out[PER];
      load_values<BITS, V>(p + t * L, stride, c, small, out, each);
      UNROLL for (int j = 0; j < PER; ++j) use(j, t, out[j]);
    }
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
    ask_strip<R>(p, stride);
    auto keep = [&](int j, int t, F w) INLINE_LAMBDA {
      fstore(panel + (j * 4 + t) * L, w);
    };
    each_value<BITS, V>(p, stride, c, small, keep, each);
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
  // Two turns of the loop at once keep more sums in flight than an addition takes; bytes
  // of entries take longer to join than that.
  constexpr int SUMS = kByPlanes<V> ? 1 : 2;
  F acc[2][4];
  clear<2>(acc);
  for (; rows >= 2 * PER; rows -= 2 * PER, x += 2 * PER) {
    UNROLL for (int u = 0; u < 2; ++u, p += R * stride) {
      ask_strip<R>(p, stride);
      auto add = [&](int j, int t, F w) INLINE_LAMBDA {
        F& to = acc[(j + u) % SUMS][t];
        to = fma(fset(x[u * PER + j]), w, to);
      };
      each_value<BITS, V>(p, stride, c, small, add, each);
    }
  }
  for (; rows > 0; rows -= PER, x += PER, p += R * stride) {
    auto add = [&](int j, int t, F w) INLINE_LAMBDA {
      if (j < rows) acc[j % SUMS][t] = fma(fset(x[j]), w, acc[j % SUMS][t]);
    };
    each_value<BITS, V>(p, stride, c, small, add, each);
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

using DecodeValues = void (*)(const uint8_t*, int64_t, int64_t, const Call&, float*);
using DotValues = void (*)(const uint8_t*, int64_t, int64_t, const Call&, const float*,
                           const float*, const F*, const F*, float*);
using MultiplyValues = void (*)(const float*, int64_t, const float*, int64_t,
                                const float*, int64_t, const F*, const F*, float*,
                                int64_t);

struct ValueCode {
  DecodeValues decode;
  DotValues dot;
};

template <int BITS, Value V>
constexpr ValueCode kValueCode = {decode_values<BITS, V>, dot_values<BITS, V>};

static ValueCode value_code(const Call& c) {
  static constexpr ValueCode low[] = {
      kValueCode<1, Value::table>, kValueCode<2, Value::table>,
      kValueCode<3, Value::table>, kValueCode<4, Value::table>};
  static constexpr ValueCode cast[] = {
      kValueCode<5, Value::cast>, kValueCode<6, Value::cast>,
      kValueCode<7, Value::cast>, kValueCode<8, Value::cast>};
  static constexpr ValueCode wide[] = {
      kValueCode<5, Value::gather>, kValueCode<6, Value::gather>,
      kValueCode<7, Value::gather>, kValueCode<8, Value::gather>};
  if (c.kind == Kind::e4m3) return kValueCode<8, Value::e4m3>;
  if (c.kind == Kind::e5m2) return kValueCode<8, Value::e5m2>;
  constexpr Value kShort = kPlanes ? Value::bf16 : Value::table;
  if (c.bits == 4 && c.bf16_table) return kValueCode<4, kShort>;
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
