// The products, written once over the primitives of lanes.h and included once per
// instruction set. Both engines decode a panel (one block of W by one strip of columns)
// into the first-level cache and multiply it by all rows of x; integer dot products leave
// execution units free, so the first rows of x are multiplied while a panel is decoded:
//
// * integer: panel of bytes, four neighbouring rows of W per dword; x is fixed point,
//   x ~ step * (256 high + low) with step = absmax of the block / 32512, or int8 rows
//   with one step; sums inside a block are exact 32-bit integers (words.h: the same of
//   16-bit numbers);
// * float: panel of float32 values, x as it is.
//
//   y[m, j] = sum over blocks of scale[g, j] * (x . code - zero[g, j] * sum of x)

#include "codes.h"
#include "scales.h"
#include "strips.h"
#include "values.h"

#if defined(QJAX_LANES_AVX2)
#include "words.h"
#else
#include "integers.h"
#endif

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

// One strip and block of `forward`: y [rows of x][4 L] += x W.
INLINE void add_strip(const Call& c, const Strip& strip, Ahead ahead, const Block& block,
                      int64_t m0, int64_t m1, const F* s, const F* z, uint8_t* panel,
                      float* y, int64_t y_stride) {
  if (c.integer_engine) {
    return add_codes(c, strip, ahead, block, m0, m1, s, z, panel, y, y_stride);
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
    for (int64_t column = c0; column < c1; column += kStrip) {
      const int64_t end = column + kStrip < c1 ? column + kStrip : c1;
      for (size_t b = 0; b < c.blocks.size(); ++b) {
        for (int64_t at = column; at < end; at += W) one(b, at);
      }
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
  alignas(64) float y[kDot];
  const DotStrip dot = strip_dot(c);
  for (int64_t column = c0; column < c1; column += kDot) {
    dot(c, column, y);
    finish(c, y, kDot, 0, 1, column, column + kDot < c1 ? column + kDot : c1, false);
  }
}

static void forward(const Call& c, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
  if (c.strips && c.integer_engine && c.m == 1) return forward_row(c, c0, c1);
  thread_local Buffer panels;
  uint8_t* panel =
      panels.get<uint8_t>(c.integer_engine ? (kBlock + 32) * W * kPanel
                                           : (kFloatBlock + 8) * W * sizeof(float));
  auto add = [&](const Strip& strip, const Ahead& ahead, const Block& block, const F* s,
                 const F* z, float* y, int64_t y_stride) INLINE_LAMBDA {
    add_strip(c, strip, ahead, block, m0, m1, s, z, panel, y, y_stride);
  };
  forward_strips(c, m0, m1, c0, c1, add);
}

#include "turned.h"

#include "prepare.h"
