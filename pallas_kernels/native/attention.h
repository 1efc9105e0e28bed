// Attention of few queries over a cache, included once per instruction set after lanes.h.
//
//   s[i, j] = cap(factor * q_i . key_j * s_k[j])     0 <= p_i - p_j < window
//   y[i] = sum_j softmax(s)[i, j] * s_v[j] * value_j
//
// for the queries of one key head together. Blocks of slots are decoded to floats once
// and then multiplied; a cache of floats is read where it lies.

// Rows of q, or of y, that are held in registers at once.
constexpr int kQueries = 4;

// `count` keys (or values) from `slot` on as floats [count][width]; in `block`, or where
// they are.
static const float* decode_slots(const AttentionCall& c, bool value, int64_t head,
                                 int64_t slot, int64_t count, float* block) {
  const Array& a = value ? c.values : c.keys;
  const int64_t first = (head * c.length + slot) * c.row + (value ? c.value_at : 0);
  if (a.type == Type::f32) return static_cast<const float*>(a.data) + first;
  auto* bytes = static_cast<const uint8_t*>(a.data) + first;
  auto* words = static_cast<const uint16_t*>(a.data) + first;
  float* to = block;
  for (int64_t i = 0; i < count; ++i, bytes += c.row, words += c.row) {
    for (int64_t d = 0; d < c.width; d += L, to += L) {
      F v;
      if (a.type == Type::f16) {
        v = load_f16(words + d);
      } else if (a.type == Type::bf16) {
        v = load_bf16(words + d);
      } else if (a.type == Type::s8) {
        v = icvt(widen_signed(bytes + d));
      } else if (c.nibbles) {
        const I code = widen(bytes + d);
        v = fsub(icvt(value ? ishift<4>(code) : iand(code, iset(15))), fset(8));
      } else {
        v = fmul(e4m3(bytes + d), fset(kE4m3));
      }
      fstore(to, v);
    }
  }
  return block;
}

// Dot products of N rows of q with `count` keys, to scores [N][stride].
template <int N>
static void score_slots(const float* q, int64_t width, const float* keys, int64_t row,
                        int64_t count, float* scores, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, keys += row) {
    F sum[N];
    UNROLL for (int r = 0; r < N; ++r) sum[r] = fset(0);
    for (int64_t d = 0; d < width; d += L) {
      const F k = fload(keys + d);
      UNROLL for (int r = 0; r < N; ++r) sum[r] = fma(fload(q + r * width + d), k, sum[r]);
    }
    UNROLL for (int r = 0; r < N; ++r) scores[r * stride + i] = fsum(sum[r]);
  }
}

// y [N][width] += weights [N][stride] of `count` slots times their values.
template <int N>
static void mix_slots(const float* weights, int64_t stride, const float* values,
                      int64_t row, int64_t count, int64_t width, float* y) {
  for (int64_t d = 0; d < width; d += L) {
    F sum[N];
    UNROLL for (int r = 0; r < N; ++r) sum[r] = fload(y + r * width + d);
    for (int64_t i = 0; i < count; ++i) {
      const F v = fload(values + i * row + d);
      UNROLL for (int r = 0; r < N; ++r) {
        sum[r] = fma(fset(weights[r * stride + i]), v, sum[r]);
      }
    }
    UNROLL for (int r = 0; r < N; ++r) fstore(y + r * width + d, sum[r]);
  }
}

// Calls `one(N, first)` for rows [first, first + N) until `rows` are done.
template <class One>
INLINE void in_tiles(int64_t rows, const One& one) {
  int64_t r = 0;
  for (; r + kQueries <= rows; r += kQueries) {
    one(std::integral_constant<int, kQueries>(), r);
  }
  for (; r < rows; ++r) one(std::integral_constant<int, 1>(), r);
}

// exp(x) for x <= 0, within 2 ulp; 0 below -87.
INLINE float exp_of(float x) {
  const float clipped = x < -87.f ? -87.f : x;
  const float turns = clipped * 1.44269504f + 12582912.f, whole = turns - 12582912.f;
  const float r = (clipped - whole * 0.693145752f) - whole * 1.42860677e-6f;
  float v = 1.f / 5040;
  v = v * r + 1.f / 720;
  v = v * r + 1.f / 120;
  v = v * r + 1.f / 24;
  v = v * r + 1.f / 6;
  v = v * r + 0.5f;
  v = v * r + 1;
  v = v * r + 1;
  const float power = as_float((as_bits(turns) << 23) + (127u << 23));
  return x < -87.f ? 0.f : v * power;
}

// Scores of one query to weights that add up to 1, or to 0 where it sees nothing.
static void softmax(const AttentionCall& c, const int32_t* positions, int32_t query,
                    const float* key_scale, const float* value_scale, int64_t count,
                    float* s) {
  constexpr float kLeast = -3.0e38f;
  for (int64_t j = 0; j < count; ++j) s[j] *= c.factor * (key_scale ? key_scale[j] : 1.f);
  if (c.softcap > 0) {
    for (int64_t j = 0; j < count; ++j) s[j] = std::tanh(s[j] / c.softcap) * c.softcap;
  }
  float top = kLeast;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t distance = int64_t(query) - positions[j];
    const bool seen = positions[j] >= 0 && distance >= 0 && distance < c.window;
    s[j] = seen ? s[j] : kLeast;
    top = s[j] > top || s[j] != s[j] ? s[j] : top;
  }
  float total = 0;
  for (int64_t j = 0; j < count; ++j) {
    s[j] = s[j] == kLeast ? 0.f : exp_of(s[j] - top);
    total += s[j];
  }
  const float share = total == 0 ? 0.f : 1 / total;
  for (int64_t j = 0; j < count; ++j) s[j] *= share * (value_scale ? value_scale[j] : 1);
}

// The queries of one row and key head, `item` of batch * kv_heads.
static void attend(const AttentionCall& c, int64_t item) {
  thread_local Buffer lines;
  const int64_t b = item / c.kv_heads, rows = c.heads / c.kv_heads * c.time;
  const int32_t *positions = c.positions + b * c.length, *queries = c.queries + b * c.time;
  // Slots that any query may see.
  int64_t first = c.length, last = 0;
  for (int64_t j = 0; j < c.length; ++j) {
    for (int64_t t = 0; t < c.time; ++t) {
      const int64_t distance = int64_t(queries[t]) - positions[j];
      if (positions[j] < 0 || distance < 0 || distance >= c.window) continue;
      first = j < first ? j : first;
      last = j + 1;
    }
  }
  const int64_t count = first < last ? last - first : 0, stride = (count + 15) / 16 * 16;
  float* q = lines.get<float>((2 * rows + kSlots) * c.width + (rows + 2) * stride);
  float *y = q + rows * c.width, *block = y + rows * c.width;
  float *scores = block + kSlots * c.width, *scales = scores + rows * stride;
  to_floats(c.q, item * rows * c.width, rows * c.width, q);
  std::memset(y, 0, rows * c.width * sizeof(float));
  const bool scaled = c.scale.type != Type::none;
  for (int64_t i = 0; scaled && i < 2; ++i) {
    to_floats(c.scale, (2 * item + i) * c.length + first, count, scales + i * stride);
  }
  const int64_t step = c.keys.type == Type::f32 ? c.row : c.width;
  for (int64_t at = 0; at < count; at += kSlots) {
    const int64_t some = count - at < kSlots ? count - at : kSlots;
    const float* keys = decode_slots(c, false, item, first + at, some, block);
    in_tiles(rows, [&](auto n, int64_t r) INLINE_LAMBDA {
      score_slots<n()>(q + r * c.width, c.width, keys, step, some,
                       scores + r * stride + at, stride);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    softmax(c, positions + first, queries[r % c.time], scaled ? scales : nullptr,
            scaled ? scales + stride : nullptr, count, scores + r * stride);
  }
  for (int64_t at = 0; at < count; at += kSlots) {
    const int64_t some = count - at < kSlots ? count - at : kSlots;
    const float* values = decode_slots(c, true, item, first + at, some, block);
    in_tiles(rows, [&](auto n, int64_t r) INLINE_LAMBDA {
      mix_slots<n()>(scores + r * stride + at, stride, values, step, some, c.width,
                     y + r * c.width);
    });
  }
  from_floats(y, rows * c.width, c.q.type, c.y, item * rows * c.width);
}
