// Activations as the engines of engine.h want them.

// The even bytes of eight.
INLINE uint32_t even_bytes(uint64_t v) {
  v &= 0x00FF00FF00FF00FF;
  v = (v | v >> 8) & 0x0000FFFF0000FFFF;
  return static_cast<uint32_t>(v | v >> 16);
}

// Bytes `[groups][4 units][PER rows]` as dwords `[groups][PER]`, `skip` dwords apart.
template <int PER>
static void place(const uint8_t* bytes, int64_t groups, int64_t skip, int32_t* out) {
  for (; groups > 0; --groups, bytes += 4 * PER, out += PER * skip) {
    if constexpr (PER == 2) {
      uint64_t all = 0;
      UNROLL for (int i = 7; i >= 0; --i) all = all << 8 | bytes[i];
      out[0] = static_cast<int32_t>(even_bytes(all));
      out[skip] = static_cast<int32_t>(even_bytes(all >> 8));
      continue;
    }
    UNROLL for (int j = 0; j < PER; ++j) {
      uint32_t four = 0;
      UNROLL for (int u = 3; u >= 0; --u) four = four << 8 | bytes[u * PER + j];
      out[j * skip] = static_cast<int32_t>(four);
    }
  }
}

// Numbers `[groups][4 units][PER rows]` as pairs of words `[groups][PER][2]`: of the even
// units, and of the odd.
static void place_words(const int32_t* q, int64_t groups, int64_t per, int32_t* out) {
  for (; groups > 0; --groups, q += 4 * per) {
    for (int64_t j = 0; j < per; ++j) {
      for (int u = 0; u < 2; ++u) {
        const auto even = static_cast<uint32_t>(q[u * per + j]);
        const auto odd = static_cast<uint32_t>(q[(u + 2) * per + j]);
        *out++ = static_cast<int32_t>((even & 0xFFFF) | odd << 16);
      }
    }
  }
}

// One block of x in fixed point, bytes in the order of a panel. Returns the sum.
static int32_t place(const Call& c, const Block& block, int32_t* q, int32_t* to) {
  uint8_t high[kBlock + 32], low[kBlock + 32];
  const int64_t count = 4 * block.dwords, groups = block.dwords / c.per;
  for (int64_t i = block.rows; i < count; ++i) q[i] = 0;
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += q[i];
  if (kWords && c.halves == 2) {
    place_words(q, groups, c.per, to);
    return total;
  }
  for (int64_t i = 0; i < count; ++i) {
    high[i] = static_cast<uint8_t>((q[i] + 128) >> 8);
    low[i] = static_cast<uint8_t>(q[i]);
  }
  auto run = c.per == 1   ? place<1>
             : c.per == 2 ? place<2>
             : c.per == 4 ? place<4>
                          : place<8>;
  const int64_t skip = c.planes ? 1 : c.halves;
  if (c.halves == 2) run(high, groups, skip, to);
  run(low, groups, skip, to + (c.halves - 1) * (c.planes ? block.dwords : 1));
  return total;
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
  } else if (c.rounded) {
    whole = absmax(x, columns) / 127.f;
    if (whole < 0x1p-126f) whole = 1;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const Block& block = c.blocks[b];
    const float* from = x + block.first;
    step[b] = c.rounded ? whole : absmax(from, block.rows) / kTop;
    const float by = coded || !(step[b] != 0) ? 1.f : step[b];
    quantize(from, block.rows, by, coded ? 128.f : c.rounded ? 127.f : kTop, q);
    // An infinite or undefined activation makes its row undefined.
    if (!(step[b] < INFINITY)) step[b] = NAN;
    sum[b] = float(place(c, block, q, c.xq_of(block, row)));
  }
}
