// Float values of the weight, with their scales: x W^T, and x W for many rows of x.
// Included by engine.h.

// A block and strip as float values of the weight, [rows][4 L].
static void decode_scaled(const Call& c, const Block& block, int64_t column,
                          const DecodeValues& decode, uint8_t* edge, float* panel) {
  const int64_t count = c.n - column < W ? c.n - column : W;
  const Strip strip = strip_of(c, block, column, count, edge);
  F s[4], z[4];
  load_scales(c, block.group, column, count, c.offset, false, s, z);
  decode(strip.p, strip.stride, block.units, c, panel);
  for (int64_t i = 0; i < block.rows; ++i) {
    UNROLL for (int t = 0; t < 4; ++t) {
      float* at = panel + (i * 4 + t) * L;
      fstore(at, fmul(s[t], fsub(fload(at), z[t])));
    }
  }
}

// y [rows][4 L] += x [rows][deep] times a panel [deep][4 L] of values.
static void add_values(const float* panel, int64_t deep, const float* x, int64_t x_stride,
                       int64_t rows, float* y, int64_t y_stride) {
  const float none = 0;
  const F one[4] = {fset(1), fset(1), fset(1), fset(1)};
  const F zero[4] = {fset(0), fset(0), fset(0), fset(0)};
  for (int64_t n; rows > 0; rows -= n, x += n * x_stride, y += n * y_stride) {
    n = rows < kRows ? rows : kRows;
    values_multiplier(n)(panel, deep, x, x_stride, &none, 0, one, zero, y, y_stride);
  }
}

// Columns [first, first + count) of rows [m0, m1) of the result of x W^T.
static void finish_turned(const Call& c, const float* y, int64_t y_stride, int64_t m0,
                          int64_t m1, int64_t first, int64_t count) {
  float line[kFloatBlock], bias[kFloatBlock];
  if (c.bias.type != Type::none) to_floats(c.bias, first, count, bias);
  for (int64_t r = m0; r < m1; ++r, y += y_stride) {
    for (int64_t i = 0; i < count; ++i) {
      line[i] = c.bias.type == Type::none ? y[i] : y[i] + bias[i];
    }
    from_floats(line, count, c.y_type, c.y, r * c.k + first);
  }
}

// Few rows of x: sums along the rows of the weight.
static void transposed_few(const Call& c, int64_t m0, int64_t m1, const Block& block) {
  thread_local Buffer panels, sums, edges;
  float* panel = panels.get<float>((kFloatBlock + 8) * W);
  uint8_t* edge = edges.get<uint8_t>(kBlock * W);
  float* sum = sums.get<float>((m1 - m0) * block.rows * L);
  std::memset(sum, 0, (m1 - m0) * block.rows * L * sizeof(float));
  const DecodeValues decode = value_code(c).decode;
  for (int64_t column = 0; column < c.n; column += W) {
    const int64_t count = c.n - column < W ? c.n - column : W;
    decode_scaled(c, block, column, decode, edge, panel);
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
  float* y = sum;  // a sum of lanes never lies behind the lanes
  for (int64_t i = 0; i < (m1 - m0) * block.rows; ++i) y[i] = fsum(fload(sum + i * L));
  finish_turned(c, y, block.rows, m0, m1, block.first, block.rows);
}

// Many rows of x: panels [columns of W][4 L rows of W], multiplied like those of x W.
static void transposed_many(const Call& c, int64_t m0, int64_t m1, const Block& block) {
  constexpr int64_t kDeep = 128;  // columns of W in a panel
  thread_local Buffer panels, turns, sums, edges;
  float* panel = panels.get<float>((kFloatBlock + 8) * W);
  uint8_t* edge = edges.get<uint8_t>(kBlock * W);
  const int64_t across = (block.rows + W - 1) / W, width = across * W + 16;
  float* turned = turns.get<float>(across * kDeep * W);
  std::memset(turned, 0, across * kDeep * W * sizeof(float));
  float* y = sums.get<float>((m1 - m0) * width);
  std::memset(y, 0, (m1 - m0) * width * sizeof(float));
  const DecodeValues decode = value_code(c).decode;
  for (int64_t first = 0; first < c.n; first += kDeep) {
    const int64_t deep = c.n - first < kDeep ? c.n - first : kDeep;
    for (int64_t j = 0; j < deep; j += W) {
      decode_scaled(c, block, first + j, decode, edge, panel);
      const int64_t count = deep - j < W ? deep - j : W;
      for (int64_t i = 0; i < block.rows; ++i) {
        float* to = turned + (i / W * kDeep + j) * W + i % W;
        for (int64_t l = 0; l < count; ++l) to[l * W] = panel[i * W + l];
      }
    }
    for (int64_t b = 0; b < across; ++b) {
      add_values(turned + b * kDeep * W, deep, c.xf + m0 * c.n + first, c.n, m1 - m0,
                 y + b * W, width);
    }
  }
  finish_turned(c, y, width, m0, m1, block.first, block.rows);
}

static void transposed(const Call& c, int64_t m0, int64_t m1, const Block& block) {
  (m1 - m0 > kFewRows ? transposed_many : transposed_few)(c, m0, m1, block);
}
