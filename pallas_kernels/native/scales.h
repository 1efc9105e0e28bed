// Scales and zero-points as vectors, included by engine.h.

// A strip's worth of numbers: where they are, or converted and padded in `line`.
INLINE const float* strip_floats(const Array& a, int64_t first, int64_t count,
                                 float* line) {
  if (a.type == Type::f32 && count == W) {
    return static_cast<const float*>(a.data) + first;
  }
  if (count < W) std::memset(line, 0, W * sizeof(float));
  to_floats(a, first, count, line);
  return line;
}

// A strip's worth of stored numbers from element `first` on.
INLINE void strip_vectors(const Array& a, int64_t first, F* out) {
  alignas(64) float line[W];
  auto* bytes = static_cast<const uint8_t*>(a.data) + first;
  auto* words = static_cast<const uint16_t*>(a.data) + first;
  auto* floats = static_cast<const float*>(a.data) + first;
  if (a.type == Type::f16) {
    UNROLL for (int t = 0; t < 4; ++t) out[t] = load_f16(words + t * L);
  } else if (a.type == Type::bf16) {
    UNROLL for (int t = 0; t < 4; ++t) out[t] = load_bf16(words + t * L);
  } else {
    if (a.type == Type::e8m0) {  // vectors, because the count is known here
      for (int i = 0; i < W; ++i) line[i] = from_e8m0(bytes[i]);
    } else if (a.type != Type::f32) {
      to_floats(a, first, W, line);
    }
    if (a.type != Type::f32) floats = line;
    UNROLL for (int t = 0; t < 4; ++t) out[t] = fload(floats + t * L);
  }
}

// Scales and zero-points of a stored strip, from element `at` on, for codes that are
// `unit` times too small.
INLINE void stored_scales(const Call& c, int64_t at, float extra, float unit, F* s, F* z) {
  strip_vectors(c.scale, at, s);
  UNROLL for (int t = 0; t < 4; ++t) s[t] = fmul(fset(unit), s[t]);
  if (c.zero.type == Type::none) {
    UNROLL for (int t = 0; t < 4; ++t) z[t] = fset(extra / unit);
    return;
  }
  strip_vectors(c.zero, at, z);
  UNROLL for (int t = 0; t < 4; ++t) z[t] = fmul(fadd(fset(extra), z[t]), fset(1 / unit));
}

// Scales and zero-points of one group and strip; columns beyond the last have scale 0,
// or what is stored for them.
INLINE void load_scales(const Call& c, int64_t group, int64_t column, int64_t count,
                        float extra, bool weave, F* s, F* z) {
  alignas(64) float scale[W], zero[W];
  const float unit = c.kind == Kind::e4m3 ? kE4m3 : 1.f;
  const int64_t at = c.scale_at(group, column);
  if (c.strips) return stored_scales(c, at, extra, unit, s, z);
  const float* from = strip_floats(c.scale, at, count, scale);
  for (int t = 0; t < 4; ++t) {
    s[t] = fmul(fset(unit), weave ? woven(from, t) : fload(from + t * L));
  }
  if (c.zero.type == Type::none) {
    for (int t = 0; t < 4; ++t) z[t] = fset(extra / unit);
    return;
  }
  from = strip_floats(c.zero, at, count, zero);
  for (int t = 0; t < 4; ++t) {
    F v = fadd(fset(extra), weave ? woven(from, t) : fload(from + t * L));
    z[t] = fmul(v, fset(1 / unit));
  }
}
