// Numbers in storage types, included once per instruction set inside its namespace.
// The loops over arrays are plain so that the compiler vectorizes them for that set;
// nothing here relies on subnormal floats, which XLA's threads flush to zero.

INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

INLINE float from_bf16(uint16_t v) { return as_float(uint32_t(v) << 16); }

INLINE float from_f16(uint16_t v) {
  uint32_t magnitude = v & 0x7FFF, sign = uint32_t(v & 0x8000) << 16;
  float small = float(int32_t(magnitude)) * 0x1p-24f;
  uint32_t bits = (magnitude << 13) + ((magnitude >= 0x7C00 ? 224u : 112u) << 23);
  bits = magnitude < 0x400 ? as_bits(small) : bits;
  return as_float(bits | sign);
}

INLINE float from_e4m3(uint8_t v) {
  uint32_t magnitude = v & 0x7F, sign = uint32_t(v & 0x80) << 24;
  float small = float(int32_t(magnitude)) * 0x1p-9f;
  uint32_t bits = (magnitude << 20) + (120u << 23);
  bits = magnitude < 8 ? as_bits(small) : bits;
  bits = magnitude == 0x7F ? 0x7FC00000u : bits;
  return as_float(bits | sign);
}

INLINE float from_e8m0(uint8_t v) {
  uint32_t bits = v ? uint32_t(v) << 23 : 0x00400000u;
  return as_float(v == 255 ? 0x7FC00000u : bits);
}

INLINE uint16_t to_bf16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
}

INLINE uint16_t to_f16(float value) {
  uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  // Below 2^-14 the sum with 2^-1 rounds to multiples of 2^-24 by itself.
  uint32_t small = as_bits(as_float(bits) + 0.5f) - 0x3F000000u;
  uint32_t normal = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  normal = normal > 0x7C00 ? 0x7C00 : normal;
  uint32_t out = bits < 0x38800000u ? small : normal;
  out = bits > 0x7F800000u ? 0x7E00u : out;
  return static_cast<uint16_t>(out | sign);
}

// `count` numbers of `a` from element `first`, as floats.
static inline void to_floats(const Array& a, int64_t first, int64_t count, float* out) {
  auto* bytes = static_cast<const uint8_t*>(a.data);
  auto* words = static_cast<const uint16_t*>(a.data);
  switch (a.type) {
    case Type::f32:
      std::memcpy(out, static_cast<const float*>(a.data) + first, count * 4);
      break;
    case Type::bf16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(words[first + i]);
      break;
    case Type::f16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_f16(words[first + i]);
      break;
    case Type::e4m3:
      for (int64_t i = 0; i < count; ++i) out[i] = from_e4m3(bytes[first + i]);
      break;
    case Type::e8m0:
      for (int64_t i = 0; i < count; ++i) out[i] = from_e8m0(bytes[first + i]);
      break;
    case Type::u8:
      for (int64_t i = 0; i < count; ++i) out[i] = float(int32_t(bytes[first + i]));
      break;
    case Type::s8:
      for (int64_t i = 0; i < count; ++i) {
        out[i] = float(int32_t(static_cast<int8_t>(bytes[first + i])));
      }
      break;
    case Type::none:
      break;
  }
}

// Writes floats as elements `first` and on of a float32, bfloat16 or float16 array.
static inline void from_floats(const float* in, int64_t count, Type type, void* to,
                               int64_t first) {
  auto* words = static_cast<uint16_t*>(to) + first;
  if (type == Type::f32) {
    std::memcpy(static_cast<float*>(to) + first, in, count * 4);
  } else if (type == Type::bf16) {
    for (int64_t i = 0; i < count; ++i) words[i] = to_bf16(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) words[i] = to_f16(in[i]);
  }
}
