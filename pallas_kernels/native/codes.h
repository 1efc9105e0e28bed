// Packed bytes to codes, over the primitives of lanes.h; and what is asked of memory for
// the codes that come next.

template <int N, int MOST>
constexpr int kAtMost = N < MOST ? N : MOST;

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

// How far ahead of their use bytes of a strip are asked for: into the first-level cache,
// and into the second.
constexpr int64_t kDistance = 1024, kFarDistance = 8192;

INLINE void ask_line(const uint8_t* p) {
  PREFETCH(p + kDistance);
  PREFETCH_FAR(p + kFarDistance);
}

// Asks for byte rows that a strip needs later, where it is stored as one.
template <int R>
INLINE void ask_strip(const uint8_t* p, int64_t stride) {
  if (stride != kStrip) return;
  UNROLL for (int r = 0; r < R; ++r) ask_line(p + r * kStrip);
}

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
        if (t * W % 64 == 0) ask_line(from);
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
