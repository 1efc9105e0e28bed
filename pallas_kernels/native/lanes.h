// Vector primitives of one instruction set, included once per set from kernels.cc with
// exactly one QJAX_LANES_* macro defined, inside that set's namespace.
//
// A strip is `W` columns: one byte vector `B`, or four float vectors `F` of `L` lanes.
// `e4m3` gives values divided by `kE4m3`: the bits of E4M3 moved into a binary16, whose
// exponent is biased by 8 more.
//
// `interleave` turns four byte rows into four vectors of dwords, one dword per column
// with a byte of each row. Dword `i` of 128-bit lane `l` of vector `t` is then column
// `16 l + 4 t + i`: the "woven" order that `woven` gives to scales.

#if defined(QJAX_LANES_AVX512)

constexpr int W = 64, L = 16, kRows = 6;
constexpr bool kWraps = true;    // table lookups ignore upper index bits
constexpr bool kPlanes = false, kWords = false;
constexpr bool kSigned = false;  // 8-bit codes enter `dot` unsigned
using B = __m512i;
using I = __m512i;
using F = __m512;
struct Table {
  F all;
};

INLINE B load(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE void store(uint8_t* p, B v) { _mm512_store_si512(p, v); }
INLINE B bzero() { return _mm512_setzero_si512(); }
INLINE B bset(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
INLINE B band(B a, B b) { return _mm512_and_si512(a, b); }
INLINE B bor(B a, B b) { return _mm512_or_si512(a, b); }
INLINE B bxor(B a, B b) { return _mm512_xor_si512(a, b); }
template <int S>
INLINE B bshift(B v) {
  if constexpr (S > 0) return _mm512_srli_epi16(v, S);
  if constexpr (S < 0) return _mm512_slli_epi16(v, -S);
  return v;
}
INLINE void interleave(B a, B b, B c, B d, B* out) {
  B ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
  B cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab, cd);
  out[1] = _mm512_unpackhi_epi16(ab, cd);
  out[2] = _mm512_unpacklo_epi16(AB, CD);
  out[3] = _mm512_unpackhi_epi16(AB, CD);
}
INLINE I izero() { return _mm512_setzero_si512(); }
INLINE I iset(int32_t v) { return _mm512_set1_epi32(v); }
INLINE I iload(const uint8_t* p) { return _mm512_load_si512(p); }
INLINE I as_dwords(B v) { return v; }
template <int BITS>
INLINE I dot(I acc, I w, I x) {
  // GCC 12 copies and spills the accumulators of the intrinsic.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
INLINE F halves(I hi, I lo) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo));
}
INLINE F icvt(I v) { return _mm512_cvtepi32_ps(v); }
INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
INLINE I ior(I a, I b) { return _mm512_or_si512(a, b); }
template <int S>
INLINE I ishift(I v) {
  if constexpr (S > 0) return _mm512_srli_epi32(v, S);
  if constexpr (S < 0) return _mm512_slli_epi32(v, -S);
  return v;
}
INLINE I widen(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE I widen_signed(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE Table table(const float* t) { return {_mm512_loadu_ps(t)}; }
INLINE F lookup(const Table& t, I i) { return _mm512_permutexvar_ps(i, t.all); }
INLINE F gather(const float* t, I i) { return _mm512_i32gather_ps(i, t, 4); }
INLINE F fload(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE F load_bf16(const uint16_t* p) {
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
INLINE void fstore(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE F fset(float v) { return _mm512_set1_ps(v); }
INLINE F fadd(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE float fsum(F v) { return _mm512_reduce_add_ps(v); }
INLINE F e4m3(const uint8_t* p) {
  __m256i v =
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m256i h =
      _mm256_and_si256(_mm256_slli_epi16(v, 7), _mm256_set1_epi16(int16_t(0xBFFF)));
  const __m256i top = _mm256_set1_epi16(0x3F80);
  __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(h, top), top);
  h = _mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
  return _mm512_cvtph_ps(h);
}
INLINE F e5m2(const uint8_t* p) {
  __m256i v =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(v, 8));
}
INLINE F woven(const float* p, int t) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p + 4 * t));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 16 + 4 * t), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 32 + 4 * t), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(p + 48 + 4 * t), 3);
}

#elif defined(QJAX_LANES_AVX2) || defined(QJAX_LANES_AVXVNNI)

constexpr int W = 32, L = 8;
constexpr bool kWraps = false;
constexpr bool kPlanes = true;  // a small table is bytes of its entries
constexpr bool kSigned = false;
using B = __m256i;
using I = __m256i;
using F = __m256;
struct Table {
  B plane[4];  // bytes 0 to 3 of the 16 entries, twice
};

INLINE B load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const B*>(p));
}
INLINE void store(uint8_t* p, B v) { _mm256_store_si256(reinterpret_cast<B*>(p), v); }
INLINE B bzero() { return _mm256_setzero_si256(); }
INLINE B bset(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
INLINE B band(B a, B b) { return _mm256_and_si256(a, b); }
INLINE B bor(B a, B b) { return _mm256_or_si256(a, b); }
INLINE B bxor(B a, B b) { return _mm256_xor_si256(a, b); }
template <int S>
INLINE B bshift(B v) {
  if constexpr (S > 0) return _mm256_srli_epi16(v, S);
  if constexpr (S < 0) return _mm256_slli_epi16(v, -S);
  return v;
}
INLINE void interleave(B a, B b, B c, B d, B* out) {
  B ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
  B cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
  out[0] = _mm256_unpacklo_epi16(ab, cd);
  out[1] = _mm256_unpackhi_epi16(ab, cd);
  out[2] = _mm256_unpacklo_epi16(AB, CD);
  out[3] = _mm256_unpackhi_epi16(AB, CD);
}
INLINE I izero() { return _mm256_setzero_si256(); }
INLINE I iset(int32_t v) { return _mm256_set1_epi32(v); }
INLINE I iload(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const I*>(p));
}
INLINE I as_dwords(B v) { return v; }
#if defined(QJAX_LANES_AVXVNNI)
constexpr int kRows = 2;
constexpr bool kWords = false;
template <int BITS>
INLINE I dot(I acc, I w, I x) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
  return acc;
}
INLINE F halves(I hi, I lo) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(hi, 8), lo));
}
#else
constexpr int kRows = 3;
constexpr bool kWords = true;  // words.h takes the place of integers.h
INLINE I even_bytes(I v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
INLINE I odd_bytes(I v) { return _mm256_srli_epi16(v, 8); }
INLINE I byte_products(I w, I x) { return _mm256_maddubs_epi16(w, x); }
// One statement each, or GCC 12 multiplies ahead and spills the sums.
INLINE I dot_words(I acc, I w, I x) {
  I product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc), "=&x"(product)
          : "x"(w), "x"(x));
  return acc;
}
INLINE I dot_bytes(I words, I w, I x) {
  I product;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(words), "=&x"(product)
          : "x"(w), "x"(x));
  return words;
}
#endif
INLINE F icvt(I v) { return _mm256_cvtepi32_ps(v); }
INLINE I iand(I a, I b) { return _mm256_and_si256(a, b); }
INLINE I ior(I a, I b) { return _mm256_or_si256(a, b); }
template <int S>
INLINE I ishift(I v) {
  if constexpr (S > 0) return _mm256_srli_epi32(v, S);
  if constexpr (S < 0) return _mm256_slli_epi32(v, -S);
  return v;
}
INLINE __m128i eight(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
INLINE I widen(const uint8_t* p) { return _mm256_cvtepu8_epi32(eight(p)); }
INLINE I widen_signed(const uint8_t* p) { return _mm256_cvtepi8_epi32(eight(p)); }
INLINE Table table(const float* t) {
  const __m128i by = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m128i v[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = _mm_shuffle_epi8(_mm_castps_si128(_mm_loadu_ps(t + 4 * i)), by);
  }
  __m128i ab = _mm_unpacklo_epi32(v[0], v[1]), AB = _mm_unpackhi_epi32(v[0], v[1]);
  __m128i cd = _mm_unpacklo_epi32(v[2], v[3]), CD = _mm_unpackhi_epi32(v[2], v[3]);
  return {_mm256_broadcastsi128_si256(_mm_unpacklo_epi64(ab, cd)),
          _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(ab, cd)),
          _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(AB, CD)),
          _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(AB, CD))};
}
// Bytes of a strip so that `interleave` undoes their order.
INLINE B unweave(B v) {
  return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
// Entries of codes that were unwoven; SHORT, without the lower two bytes.
template <bool SHORT>
INLINE void lookup(const Table& t, B codes, F* out, std::bool_constant<SHORT>) {
  B b[4], v[4];
  UNROLL for (int i = 0; i < 4; ++i) b[i] = _mm256_shuffle_epi8(t.plane[i], codes);
  if constexpr (SHORT) {
    B low = _mm256_unpacklo_epi8(b[2], b[3]), high = _mm256_unpackhi_epi8(b[2], b[3]);
    v[0] = _mm256_unpacklo_epi16(bzero(), low);
    v[1] = _mm256_unpackhi_epi16(bzero(), low);
    v[2] = _mm256_unpacklo_epi16(bzero(), high);
    v[3] = _mm256_unpackhi_epi16(bzero(), high);
  } else {
    interleave(b[0], b[1], b[2], b[3], v);
  }
  UNROLL for (int i = 0; i < 4; ++i) out[i] = _mm256_castsi256_ps(v[i]);
}
INLINE F gather(const float* t, I i) { return _mm256_i32gather_ps(t, i, 4); }
INLINE F fload(const float* p) { return _mm256_loadu_ps(p); }
INLINE F load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE F load_bf16(const uint16_t* p) {
  __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
INLINE void fstore(float* p, F v) { _mm256_storeu_ps(p, v); }
INLINE F fset(float v) { return _mm256_set1_ps(v); }
INLINE F fadd(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F fsub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F fmul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE float fsum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE F e4m3(const uint8_t* p) {
  __m128i v = _mm_cvtepi8_epi16(eight(p));
  __m128i h = _mm_and_si128(_mm_slli_epi16(v, 7), _mm_set1_epi16(int16_t(0xBFFF)));
  const __m128i top = _mm_set1_epi16(0x3F80);
  __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(h, top), top);
  h = _mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7E00)));
  return _mm256_cvtph_ps(h);
}
INLINE F e5m2(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(eight(p)), 8));
}
INLINE F woven(const float* p, int t) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * t)),
                              _mm_loadu_ps(p + 16 + 4 * t), 1);
}

#elif defined(QJAX_LANES_NEON)

constexpr int W = 16, L = 4, kRows = 4;
constexpr bool kWraps = false, kPlanes = false, kWords = false;
constexpr bool kSigned = true;
using B = uint8x16_t;
using I = int32x4_t;
using F = float32x4_t;
struct Table {
  const float* all;
};

INLINE B load(const uint8_t* p) { return vld1q_u8(p); }
INLINE void store(uint8_t* p, B v) { vst1q_u8(p, v); }
INLINE B bzero() { return vdupq_n_u8(0); }
INLINE B bset(int byte) { return vdupq_n_u8(static_cast<uint8_t>(byte)); }
INLINE B band(B a, B b) { return vandq_u8(a, b); }
INLINE B bor(B a, B b) { return vorrq_u8(a, b); }
INLINE B bxor(B a, B b) { return veorq_u8(a, b); }
template <int S>
INLINE B bshift(B v) {
  if constexpr (S > 0) return vshrq_n_u8(v, S);
  if constexpr (S < 0) return vshlq_n_u8(v, -S);
  return v;
}
INLINE B zip16(B a, B b, bool high) {
  uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
  return vreinterpretq_u8_u16(high ? vzip2q_u16(x, y) : vzip1q_u16(x, y));
}
INLINE void interleave(B a, B b, B c, B d, B* out) {
  B ab = vzip1q_u8(a, b), AB = vzip2q_u8(a, b);
  B cd = vzip1q_u8(c, d), CD = vzip2q_u8(c, d);
  out[0] = zip16(ab, cd, false);
  out[1] = zip16(ab, cd, true);
  out[2] = zip16(AB, CD, false);
  out[3] = zip16(AB, CD, true);
}
INLINE I izero() { return vdupq_n_s32(0); }
INLINE I iset(int32_t v) { return vdupq_n_s32(v); }
INLINE I iload(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
INLINE I as_dwords(B v) { return vreinterpretq_s32_u8(v); }
template <int BITS>
INLINE I dot(I acc, I w, I x) {
  return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
INLINE F halves(I hi, I lo) {
  return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(hi, 8), lo));
}
INLINE F icvt(I v) { return vcvtq_f32_s32(v); }
INLINE I iand(I a, I b) { return vandq_s32(a, b); }
INLINE I ior(I a, I b) { return vorrq_s32(a, b); }
template <int S>
INLINE I ishift(I v) {
  if constexpr (S > 0) return vshrq_n_s32(v, S);
  if constexpr (S < 0) return vshlq_n_s32(v, -S);
  return v;
}
INLINE uint8x8_t four(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return vcreate_u8(v);
}
INLINE I widen(const uint8_t* p) {
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four(p)))));
}
INLINE I widen_signed(const uint8_t* p) {
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four(p)))));
}
INLINE Table table(const float* t) { return {t}; }
INLINE F gather(const float* t, I i) {
  float v[4] = {t[vgetq_lane_s32(i, 0)], t[vgetq_lane_s32(i, 1)],
                t[vgetq_lane_s32(i, 2)], t[vgetq_lane_s32(i, 3)]};
  return vld1q_f32(v);
}
INLINE F lookup(const Table& t, I i) { return gather(t.all, i); }
INLINE F fload(const float* p) { return vld1q_f32(p); }
INLINE F load_f16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
INLINE F load_bf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
INLINE void fstore(float* p, F v) { vst1q_f32(p, v); }
INLINE F fset(float v) { return vdupq_n_f32(v); }
INLINE F fadd(F a, F b) { return vaddq_f32(a, b); }
INLINE F fsub(F a, F b) { return vsubq_f32(a, b); }
INLINE F fmul(F a, F b) { return vmulq_f32(a, b); }
INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
INLINE F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
INLINE float fsum(F v) { return vaddvq_f32(v); }
INLINE F e4m3(const uint8_t* p) {
  int16x4_t v = vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four(p))));
  uint16x4_t h =
      vand_u16(vreinterpret_u16_s16(vshl_n_s16(v, 7)), vdup_n_u16(0xBFFF));
  const uint16x4_t top = vdup_n_u16(0x3F80);
  h = vorr_u16(h, vand_u16(vceq_u16(vand_u16(h, top), top), vdup_n_u16(0x7E00)));
  return vcvt_f32_f16(vreinterpret_f16_u16(h));
}
INLINE F e5m2(const uint8_t* p) {
  uint16x4_t v = vget_low_u16(vmovl_u8(four(p)));
  return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(v, 8)));
}
INLINE F woven(const float* p, int t) { return vld1q_f32(p + 4 * t); }

#else  // plain C++

constexpr int W = 16, L = 4, kRows = 2;
constexpr bool kWraps = false, kPlanes = false, kWords = false;
constexpr bool kSigned = false;
struct B {
  uint8_t v[16];
};
struct I {
  int32_t v[4];
};
struct F {
  float v[4];
};
struct Table {
  const float* all;
};

#define QJAX_EACH(T, n, expression)         \
  T r;                                      \
  for (int i = 0; i < n; ++i) r.v[i] = expression; \
  return r;
INLINE B load(const uint8_t* p) { QJAX_EACH(B, 16, p[i]) }
INLINE void store(uint8_t* p, B v) { std::memcpy(p, v.v, 16); }
INLINE B bzero() { return B{}; }
INLINE B bset(int byte) { QJAX_EACH(B, 16, static_cast<uint8_t>(byte)) }
INLINE B band(B a, B b) { QJAX_EACH(B, 16, a.v[i] & b.v[i]) }
INLINE B bor(B a, B b) { QJAX_EACH(B, 16, a.v[i] | b.v[i]) }
INLINE B bxor(B a, B b) { QJAX_EACH(B, 16, a.v[i] ^ b.v[i]) }
template <int S>
INLINE B bshift(B a) {
  if constexpr (S >= 0) {
    QJAX_EACH(B, 16, static_cast<uint8_t>(a.v[i] >> S))
  } else {
    QJAX_EACH(B, 16, static_cast<uint8_t>(a.v[i] << -S))
  }
}
INLINE void interleave(B a, B b, B c, B d, B* out) {
  for (int i = 0; i < 16; ++i) {
    uint8_t* to = out[i / 4].v + i % 4 * 4;
    to[0] = a.v[i], to[1] = b.v[i], to[2] = c.v[i], to[3] = d.v[i];
  }
}
INLINE I izero() { return I{}; }
INLINE I iset(int32_t x) { QJAX_EACH(I, 4, x) }
INLINE I iload(const uint8_t* p) {
  I r;
  std::memcpy(r.v, p, 16);
  return r;
}
INLINE I as_dwords(B v) {
  I r;
  std::memcpy(r.v, v.v, 16);
  return r;
}
template <int BITS>
INLINE I dot(I acc, I w, I x) {
  uint8_t a[16];
  int8_t b[16];
  std::memcpy(a, w.v, 16);
  std::memcpy(b, x.v, 16);
  for (int i = 0; i < 16; ++i) acc.v[i / 4] += int32_t(a[i]) * int32_t(b[i]);
  return acc;
}
INLINE F halves(I hi, I lo) {
  QJAX_EACH(F, 4, static_cast<float>(hi.v[i] * 256 + lo.v[i]))
}
INLINE F icvt(I a) { QJAX_EACH(F, 4, static_cast<float>(a.v[i])) }
INLINE I iand(I a, I b) { QJAX_EACH(I, 4, a.v[i] & b.v[i]) }
INLINE I ior(I a, I b) { QJAX_EACH(I, 4, a.v[i] | b.v[i]) }
template <int S>
INLINE I ishift(I a) {
  if constexpr (S >= 0) {
    QJAX_EACH(I, 4, a.v[i] >> S)
  } else {
    QJAX_EACH(I, 4, a.v[i] << -S)
  }
}
INLINE I widen(const uint8_t* p) { QJAX_EACH(I, 4, p[i]) }
INLINE I widen_signed(const uint8_t* p) { QJAX_EACH(I, 4, static_cast<int8_t>(p[i])) }
INLINE Table table(const float* t) { return {t}; }
INLINE F gather(const float* t, I a) { QJAX_EACH(F, 4, t[a.v[i]]) }
INLINE F lookup(const Table& t, I a) { return gather(t.all, a); }
INLINE F fload(const float* p) { QJAX_EACH(F, 4, p[i]) }
INLINE F load_f16(const uint16_t* p) { QJAX_EACH(F, 4, from_f16(p[i])) }
INLINE F load_bf16(const uint16_t* p) { QJAX_EACH(F, 4, from_bf16(p[i])) }
INLINE void fstore(float* p, F v) { std::memcpy(p, v.v, 16); }
INLINE F fset(float x) { QJAX_EACH(F, 4, x) }
INLINE F fadd(F a, F b) { QJAX_EACH(F, 4, a.v[i] + b.v[i]) }
INLINE F fsub(F a, F b) { QJAX_EACH(F, 4, a.v[i] - b.v[i]) }
INLINE F fmul(F a, F b) { QJAX_EACH(F, 4, a.v[i] * b.v[i]) }
INLINE F fma(F a, F b, F c) { QJAX_EACH(F, 4, a.v[i] * b.v[i] + c.v[i]) }
INLINE F fnma(F a, F b, F c) { QJAX_EACH(F, 4, c.v[i] - a.v[i] * b.v[i]) }
INLINE float fsum(F a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
INLINE F e4m3(const uint8_t* p) { QJAX_EACH(F, 4, from_e4m3(p[i]) / kE4m3) }
INLINE F e5m2(const uint8_t* p) {
  QJAX_EACH(F, 4, from_f16(static_cast<uint16_t>(p[i] << 8)))
}
INLINE F woven(const float* p, int t) { return fload(p + 4 * t); }
#undef QJAX_EACH

#endif
