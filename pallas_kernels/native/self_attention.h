// Attention of a row's tokens to themselves, included once per instruction set after
// engine.h and attention.h.
//
//   P = softmax(factor Q K^T), masked      Y = P V
//   dV = P^T dY    D = dY V^T    dS = factor P (D - rowsum(P D))    dQ = dS K    dK = dS^T Q
//
// A tile of 4 L queries has all its scores at once, transposed: [keys][4 L], a query in a
// lane. That is a panel for products with K^T and V^T, and rows for those with Q and dY,
// so that no scores are turned, and softmax adds whole vectors. Scores are made anew for
// the gradient; none are stored. Only the keys between the first and the last that a tile
// sees are read.
//
// Reference: Dao, FlashAttention-2, arXiv 2307.08691, equations of section 3.

INLINE int64_t whole_strips(int64_t count) { return (count + W - 1) / W * W; }

// x [rows][columns] to out [columns][out_stride].
static void turn(const float* x, int64_t stride, int64_t rows, int64_t columns, float* out,
                 int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    for (int64_t j = 0; j < columns; ++j) out[j * out_stride + r] = x[j];
  }
}

// x [rows][columns] to a panel [columns][4 L] of its transpose, padded with zeros.
static void to_turned_panel(const float* x, int64_t stride, int64_t rows, int64_t columns,
                            float* panel) {
  if (rows < W) std::memset(panel, 0, columns * W * sizeof(float));
  turn(x, stride, rows, columns, panel, W);
}

// x [rows][columns] to panels [columns / wide][rows][wide], padded with zeros.
static void to_panels(const float* x, int64_t stride, int64_t rows, int64_t columns,
                      int64_t wide, float* out) {
  for (int64_t first = 0; first < columns; first += wide) {
    const int64_t count = columns - first < wide ? columns - first : wide;
    for (int64_t i = 0; i < rows; ++i, out += wide) {
      std::memcpy(out, x + i * stride + first, count * sizeof(float));
      if (count < wide) std::memset(out + count, 0, (wide - count) * sizeof(float));
    }
  }
}

// y [MR][2 L] += x [MR][deep] times a panel [deep][2 L].
template <int MR>
static void add_half(const float* panel, int64_t deep, const float* x, int64_t x_stride,
                     float* y, int64_t y_stride) {
  F acc[MR][2];
  UNROLL for (int r = 0; r < MR; ++r) {
    acc[r][0] = fload(y + r * y_stride), acc[r][1] = fload(y + r * y_stride + L);
  }
  for (int64_t i = 0; i < deep; ++i, panel += 2 * L) {
    const F left = fload(panel), right = fload(panel + L);
    UNROLL for (int r = 0; r < MR; ++r) {
      const F v = fset(x[r * x_stride + i]);
      acc[r][0] = fma(v, left, acc[r][0]), acc[r][1] = fma(v, right, acc[r][1]);
    }
  }
  UNROLL for (int r = 0; r < MR; ++r) {
    fstore(y + r * y_stride, acc[r][0]), fstore(y + r * y_stride + L, acc[r][1]);
  }
}

// y [rows][columns] += x [rows][deep] times panels, of 4 L columns or, where one of half
// the width holds them all, 2 L.
static void add_panels(const float* panels, int64_t deep, int64_t columns, int64_t wide,
                       const float* x, int64_t x_stride, int64_t rows, float* y,
                       int64_t y_stride) {
  if (wide == W) {
    for (int64_t first = 0; first < columns; first += W, panels += deep * W) {
      add_values(panels, deep, x, x_stride, rows, y + first, y_stride);
    }
    return;
  }
  int64_t r = 0;
  for (; r + 2 * kRows <= rows; r += 2 * kRows) {
    add_half<2 * kRows>(panels, deep, x + r * x_stride, x_stride, y + r * y_stride,
                        y_stride);
  }
  for (; r < rows; ++r) {
    add_half<1>(panels, deep, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
  }
}

// Tokens of a tile or a row: places, and the documents they belong to.
struct Tokens {
  const int32_t *positions, *segments;
};

// Dot products [keys][4 L] to weights that add up to 1 for each query, or to 0 where it
// sees nothing.
static void softmax_self(const SelfCall& c, Tokens keys, Tokens queries, int64_t count,
                         float* s) {
  constexpr float kLeast = -3.0e38f;
  const float factor = c.factor;
  const int32_t window = static_cast<int32_t>(c.window);
  alignas(64) float tops[W], part[W];
  for (int l = 0; l < W; ++l) tops[l] = kLeast, part[l] = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t at = keys.positions[j], segment = keys.segments[j];
    float* row = s + j * W;
    for (int l = 0; l < W; ++l) {
      const int32_t distance = queries.positions[l] - at;
      const bool seen = (at >= 0) & (distance >= 0) & (distance < window) &
                        (queries.segments[l] == segment);
      const float v = seen ? row[l] * factor : kLeast;
      row[l] = v;
      tops[l] = v > tops[l] ? v : tops[l];
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    float* row = s + j * W;
    for (int l = 0; l < W; ++l) {
      const float v = row[l] == kLeast ? 0.f : exp_of(row[l] - tops[l]);
      row[l] = v;
      part[l] += v;
    }
  }
  for (int l = 0; l < W; ++l) part[l] = part[l] == 0 ? 0.f : 1 / part[l];
  for (int64_t j = 0; j < count; ++j) {
    for (int l = 0; l < W; ++l) s[j * W + l] *= part[l];
  }
}

// Weights and their gradient to that of the dot products, in place of the latter.
static void softmax_gradient(const float* p, int64_t count, float factor, float* d) {
  alignas(64) float mean[W] = {};
  for (int64_t j = 0; j < count; ++j) {
    for (int l = 0; l < W; ++l) mean[l] += p[j * W + l] * d[j * W + l];
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int l = 0; l < W; ++l) {
      const int64_t i = j * W + l;
      d[i] = factor * p[i] * (d[i] - mean[l]);
    }
  }
}

// Keys of which the queries [t0, t1) see any.
static void reach(const SelfCall& c, Tokens all, int64_t t0, int64_t t1, int64_t* first,
                  int64_t* last) {
  int32_t low = INT32_MAX, high = -1, from = INT32_MAX, to = INT32_MIN;
  for (int64_t t = t0; t < t1; ++t) {
    low = all.positions[t] < low ? all.positions[t] : low;
    high = all.positions[t] > high ? all.positions[t] : high;
    from = all.segments[t] < from ? all.segments[t] : from;
    to = all.segments[t] > to ? all.segments[t] : to;
  }
  *first = c.time, *last = 0;
  for (int64_t j = 0; j < c.time; ++j) {
    const int32_t at = all.positions[j];
    if (at < 0 || at > high || low - at >= c.window || all.segments[j] < from ||
        all.segments[j] > to) {
      continue;
    }
    *first = j < *first ? j : *first;
    *last = j + 1;
  }
  if (*last < *first) *last = *first;
}

// The queries of one row and key head, `item` of batch * kv_heads.
static void attend_self(const SelfCall& c, int64_t item) {
  thread_local Buffer floats, numbers;
  const int64_t b = item / c.kv_heads, h = item % c.kv_heads, width = c.width;
  const int64_t groups = c.heads / c.kv_heads, row = c.heads * width;
  const int64_t slots = whole_strips(c.time), stride = slots + 16;
  const int64_t wide = width <= W / 2 ? W / 2 : W;
  const int64_t across = (width + wide - 1) / wide * wide;
  const bool gradient = c.dy != nullptr;

  // Padded with queries that see nothing.
  int32_t* positions = numbers.get<int32_t>(2 * slots);
  int32_t* segments = positions + slots;
  for (int64_t j = 0; j < slots; ++j) {
    positions[j] = j < c.time ? c.positions[b * c.time + j] : -1;
    segments[j] = j < c.time ? c.segments[b * c.time + j] : -1;
  }
  const Tokens all{positions, segments};
  const float *k = c.k + item * c.time * width, *v = c.v + item * c.time * width;
  float* at = floats.get<float>(width * stride + 2 * slots * W + 2 * width * W +
                                (gradient ? W * across + 2 * c.time * across : 0));
  float* turned = at;  // V^T, or K^T
  turn(gradient ? k : v, width, c.time, width, turned, stride);
  float *p = turned + width * stride, *d = p + slots * W;
  float *panel = d + slots * W, *line = panel + width * W;
  float *panels = line + width * W, *dk = panels + W * across, *dv = dk + c.time * across;
  if (gradient) std::memset(dk, 0, 2 * c.time * across * sizeof(float));

  for (int64_t t = 0; t < c.time; t += W) {
    const int64_t count = c.time - t < W ? c.time - t : W;
    int64_t first, last;
    reach(c, all, t, t + count, &first, &last);
    const int64_t seen = last - first;
    const Tokens keys{positions + first, segments + first};
    const Tokens queries{positions + t, segments + t};
    // out [seen][4 L] = x [seen][width] times the transpose of a tile
    auto dots = [&](const float* tile, const float* x, float* out) {
      to_turned_panel(tile, row, count, width, panel);
      std::memset(out, 0, seen * W * sizeof(float));
      add_values(panel, width, x + first * width, width, seen, out, W);
    };
    // out, a tile, = the transpose of `turned` times weights [seen][4 L]
    auto mix = [&](const float* weights, float* out) {
      std::memset(line, 0, width * W * sizeof(float));
      add_values(weights, seen, turned + first, stride, width, line, W);
      for (int64_t r = 0; r < count; ++r, out += row) {
        for (int64_t i = 0; i < width; ++i) out[i] = line[i * W + r];
      }
    };
    // out [seen][width] += weights [seen][4 L] times a tile
    auto gather_tile = [&](const float* weights, const float* tile, float* out) {
      to_panels(tile, row, count, width, wide, panels);
      add_panels(panels, count, width, wide, weights, W, seen, out + first * across,
                 across);
    };
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = (b * c.time + t) * row + (h * groups + g) * width;
      dots(c.q + from, k, p);
      softmax_self(c, keys, queries, seen, p);
      if (!gradient) {
        mix(p, c.y + from);
        continue;
      }
      gather_tile(p, c.dy + from, dv);
      dots(c.dy + from, v, d);
      softmax_gradient(p, seen, c.factor, d);
      mix(d, c.dq + from);
      gather_tile(d, c.q + from, dk);
    }
  }
  for (int64_t j = 0; j < c.time && gradient; ++j) {
    const int64_t to = (item * c.time + j) * width;
    std::memcpy(c.dk + to, dk + j * across, width * sizeof(float));
    std::memcpy(c.dv + to, dv + j * across, width * sizeof(float));
  }
}
