// Activations as the engines of engine.h want them.

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
