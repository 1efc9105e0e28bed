// Attention of a row's tokens to themselves, included once per instruction set after
// engine.h and attention.h.
//
//   P = softmax(factor Q K^T), masked      Y = P V
//   dV = P^T dY    D = dY V^T    dS = factor P (D - rowsum(P D))    dQ = dS K    dK = dS^T Q
//
// A tile of queries has all its scores at once; they are made anew for the gradient, so
// none are stored. Only the keys between the first and the last that a tile sees are read.
// Operands are packed as panels [columns / 4 L][depth][4 L], padded with zeros, and every
// product is the one of values.h.
//
// Reference: Dao, FlashAttention-2, arXiv 2307.08691, equations of section 3.

constexpr int64_t kTileQueries = 64;

INLINE int64_t whole_strips(int64_t count) { return (count + W - 1) / W * W; }

// x [depth][columns] to panels; returns their end.
static float* to_panels(const float* x, int64_t stride, int64_t depth, int64_t columns,
                        float* out) {
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t count = columns - first < W ? columns - first : W;
    for (int64_t i = 0; i < depth; ++i, out += W) {
      std::memcpy(out, x + i * stride + first, count * sizeof(float));
      if (count < W) std::memset(out + count, 0, (W - count) * sizeof(float));
    }
  }
  return out;
}

// x [columns][depth], transposed, to panels; returns their end.
static float* to_turned_panels(const float* x, int64_t columns, int64_t depth,
                               float* out) {
  for (int64_t first = 0; first < columns; first += W, out += depth * W) {
    for (int64_t l = 0; l < W; ++l) {
      const float* from = x + (first + l) * depth;
      const bool within = first + l < columns;
      for (int64_t i = 0; i < depth; ++i) out[i * W + l] = within ? from[i] : 0.f;
    }
  }
  return out;
}

// y [rows][columns] = x [rows][depth] times panels of `all` deep, from `skip` on.
static void multiply_panels(const float* panels, int64_t all, int64_t skip, int64_t depth,
                            int64_t columns, const float* x, int64_t x_stride,
                            int64_t rows, float* y, int64_t y_stride, bool add) {
  for (int64_t r = 0; r < rows && !add; ++r) {
    std::memset(y + r * y_stride, 0, whole_strips(columns) * sizeof(float));
  }
  for (int64_t first = 0; first < columns; first += W, panels += all * W) {
    add_values(panels + skip * W, depth, x, x_stride, rows, y + first, y_stride);
  }
}

// x [rows][columns] to out [columns][kTileQueries].
static void turn_tile(const float* x, int64_t stride, int64_t rows, int64_t columns,
                      float* out) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = 0; r < rows; ++r) out[j * kTileQueries + r] = x[r * stride + j];
  }
}

// Sums of 16 numbers in turn, which compilers add as vectors.
INLINE float sum_of(const float* part) {
  float total = 0;
  for (int l = 0; l < 16; ++l) total += part[l];
  return total;
}

// One row of `count` dot products (whole strips) to weights that add up to 1, or to 0
// where the query sees nothing.
static void softmax_self(const SelfCall& c, const int32_t* positions,
                         const int32_t* segments, int32_t position, int32_t segment,
                         int64_t count, float* s) {
  constexpr float kLeast = -3.0e38f;
  const float factor = c.factor;
  const int32_t window = static_cast<int32_t>(c.window);
  float tops[16], part[16] = {};
  for (int l = 0; l < 16; ++l) tops[l] = kLeast;
  for (int64_t j = 0; j < count; j += 16) {
    for (int l = 0; l < 16; ++l) {
      const int32_t at = positions[j + l], distance = position - at;
      const bool seen = (at >= 0) & (distance >= 0) & (distance < window) &
                        (segments[j + l] == segment);
      const float v = seen ? s[j + l] * factor : kLeast;
      s[j + l] = v;
      tops[l] = v > tops[l] ? v : tops[l];
    }
  }
  float top = kLeast;
  for (int l = 0; l < 16; ++l) top = tops[l] > top ? tops[l] : top;
  for (int64_t j = 0; j < count; j += 16) {
    for (int l = 0; l < 16; ++l) {
      const float v = s[j + l] == kLeast ? 0.f : exp_of(s[j + l] - top);
      s[j + l] = v;
      part[l] += v;
    }
  }
  const float total = sum_of(part), share = total == 0 ? 0.f : 1 / total;
  for (int64_t j = 0; j < count; ++j) s[j] *= share;
}

// Weights and their gradient to that of the dot products, in place of the latter.
static void softmax_gradient(const float* p, int64_t count, float factor, float* d) {
  float part[16] = {};
  for (int64_t j = 0; j < count; j += 16) {
    for (int l = 0; l < 16; ++l) part[l] += p[j + l] * d[j + l];
  }
  const float mean = sum_of(part);
  for (int64_t j = 0; j < count; ++j) d[j] = factor * p[j] * (d[j] - mean);
}

// Keys, in whole strips, of which the queries [t0, t1) see any.
static void reach(const SelfCall& c, const int32_t* positions, const int32_t* segments,
                  int64_t t0, int64_t t1, int64_t* first, int64_t* last) {
  int32_t low = INT32_MAX, high = -1, from = INT32_MAX, to = INT32_MIN;
  for (int64_t t = t0; t < t1; ++t) {
    low = positions[t] < low ? positions[t] : low;
    high = positions[t] > high ? positions[t] : high;
    from = segments[t] < from ? segments[t] : from;
    to = segments[t] > to ? segments[t] : to;
  }
  *first = c.time, *last = 0;
  for (int64_t j = 0; j < c.time; ++j) {
    if (positions[j] < 0 || positions[j] > high || low - positions[j] >= c.window ||
        segments[j] < from || segments[j] > to) {
      continue;
    }
    *first = j < *first ? j : *first;
    *last = j + 1;
  }
  *first = *first / W * W;
  *last = *last > *first ? whole_strips(*last) : *first;
}

// The queries of one row and key head, `item` of batch * kv_heads.
static void attend_self(const SelfCall& c, int64_t item) {
  thread_local Buffer floats, numbers;
  const int64_t b = item / c.kv_heads, h = item % c.kv_heads, width = c.width;
  const int64_t groups = c.heads / c.kv_heads, row = c.heads * width;
  const int64_t slots = whole_strips(c.time), wide = whole_strips(width) + 16;
  const int64_t stride = slots + 16, strip = whole_strips(width);
  const bool gradient = c.dy != nullptr;

  // Positions and segments, padded with keys that nobody sees.
  int32_t* positions = numbers.get<int32_t>(2 * slots);
  int32_t* segments = positions + slots;
  for (int64_t j = 0; j < slots; ++j) {
    positions[j] = j < c.time ? c.positions[b * c.time + j] : -1;
    segments[j] = j < c.time ? c.segments[b * c.time + j] : -1;
  }
  const float *k = c.k + item * c.time * width, *v = c.v + item * c.time * width;
  const int64_t tile = kTileQueries * stride, turned = kTileQueries * slots;
  const int64_t panels = slots * width + c.time * strip;
  float* at = floats.get<float>(2 * panels + 2 * tile + kTileQueries * (wide + 2 * strip) +
                                (gradient ? 2 * turned + 2 * slots * wide : 0));
  const float* keys = at;  // K^T
  at = to_turned_panels(k, c.time, width, at);
  const float* values = at;  // V, or V^T and K
  at = gradient ? to_turned_panels(v, c.time, width, at)
                : to_panels(v, width, c.time, width, at);
  const float* plain = at;
  if (gradient) at = to_panels(k, width, c.time, width, at);
  float *p = at, *d = p + tile, *line = d + tile, *turn = line + kTileQueries * wide;
  float* rows = turn + turned;  // packed rows of q or dy
  float *dk = rows + 2 * kTileQueries * strip, *dv = dk + slots * wide;
  if (gradient) std::memset(dk, 0, 2 * slots * wide * sizeof(float));

  for (int64_t t = 0; t < c.time; t += kTileQueries) {
    const int64_t count = c.time - t < kTileQueries ? c.time - t : kTileQueries;
    int64_t first, last;
    reach(c, positions, segments, t, t + count, &first, &last);
    const int64_t seen = last - first, real = (last < c.time ? last : c.time) - first;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = (b * c.time + t) * row + (h * groups + g) * width;
      const float* q = c.q + from;
      multiply_panels(keys + first * width, width, 0, width, seen, q, row, count, p,
                      stride, false);
      for (int64_t r = 0; r < count; ++r) {
        softmax_self(c, positions + first, segments + first, positions[t + r],
                     segments[t + r], seen, p + r * stride);
      }
      if (!gradient) {
        multiply_panels(values, c.time, first, real, width, p, stride, count, line, wide,
                        false);
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(c.y + from + r * row, line + r * wide, width * sizeof(float));
        }
        continue;
      }
      const float* dy = c.dy + from;
      turn_tile(p, stride, count, seen, turn);
      to_panels(dy, row, count, width, rows);
      multiply_panels(rows, count, 0, count, width, turn, kTileQueries, seen,
                      dv + first * wide, wide, true);
      multiply_panels(values + first * width, width, 0, width, seen, dy, row, count, d,
                      stride, false);
      for (int64_t r = 0; r < count; ++r) {
        softmax_gradient(p + r * stride, seen, c.factor, d + r * stride);
      }
      multiply_panels(plain, c.time, first, real, width, d, stride, count, line, wide,
                      false);
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(c.dq + from + r * row, line + r * wide, width * sizeof(float));
      }
      turn_tile(d, stride, count, seen, turn);
      to_panels(q, row, count, width, rows);
      multiply_panels(rows, count, 0, count, width, turn, kTileQueries, seen,
                      dk + first * wide, wide, true);
    }
  }
  for (int64_t j = 0; j < c.time && gradient; ++j) {
    const int64_t to = (item * c.time + j) * width;
    std::memcpy(c.dk + to, dk + j * wide, width * sizeof(float));
    std::memcpy(c.dv + to, dv + j * wide, width * sizeof(float));
  }
}
