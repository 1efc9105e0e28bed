// Strips of packed rows and the activations that meet them, included by engine.h.

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

// Quantized activations of some rows and one block, and what turns sums into results.
struct Factors {
  const int32_t* x;
  int64_t x_stride;
  const float *step, *sum;
  int64_t step_stride;
};

// Quantized x of a block from row `r` on.
INLINE Factors factors_of(const Call& c, const Block& block, int64_t r) {
  const int64_t blocks = c.blocks.size(), at = r * blocks + (&block - c.blocks.data());
  return {c.xq_of(block, r), block.dwords * c.halves, c.step + at, c.sum + at, blocks};
}
