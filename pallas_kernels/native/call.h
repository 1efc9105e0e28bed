// What one product is, shared by all instruction sets.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace qjax {

enum class Type { none, f32, bf16, f16, e4m3, e8m0, u8, s8 };
enum class Kind { integer, table, e4m3, e5m2 };

constexpr int64_t kStrip = 64;  // columns of a stored strip

struct Array {
  const void* data = nullptr;
  Type type = Type::none;
};

// Rows of one group of the weight, cut so that exact sums fit 32 bits.
struct Block {
  int64_t first;   // row of W
  int64_t rows;    // of W, before padding
  int64_t group;   // row of the scales
  int64_t packed;  // first byte row
  int64_t units;   // packing units
  int64_t dwords;  // of quantized x per row of x, in whole tiles for a matrix unit
  int64_t dword;   // first of them
};

// Memory for vectors: aligned to a cache line, grown and kept.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <typename T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Call {
  Kind kind = Kind::integer;
  int bits = 4;
  int per = 2;        // rows of W in a packing unit
  int unit_rows = 1;  // byte rows of a packing unit
  bool signed_codes = false;
  bool transpose = false;
  bool integer_engine = false;
  bool rounded = false;  // to int8 activations
  int halves = 2;        // bytes that an engine wants of a quantized activation
  bool planes = false;  // the integer engine multiplies in tiles of a matrix unit
  int64_t tile = 1;     // dwords of x that it multiplies at once
  int64_t m = 0, k = 0, n = 0;
  // The weight is stored strip after strip of kStrip columns, each with `strip_rows` byte
  // rows and its scales (matmul/cpu_layout.py); integers lie in the order of a panel.
  bool strips = false;
  int64_t strip_rows = 0, groups = 1;
  float offset = 0;
  const uint8_t* codes = nullptr;
  Array scale, zero, x, x_scale, bias;
  float table[256] = {};
  bool bf16_table = false;  // its entries are exact in bfloat16
  void* y = nullptr;
  Type y_type = Type::f32;
  std::vector<Block> blocks;
  int64_t dwords = 0;

  // Activations as an engine wants them, made by `prepare`.
  int32_t* xq = nullptr;      // per block [m, dwords, halves], or [m, halves, dwords] in
                              // planes
  const float* xf = nullptr;  // [m, columns of x]
  float* step = nullptr;      // [m, blocks]
  float* sum = nullptr;       // [m, blocks], of quantized or float x

  int64_t columns() const { return transpose ? n : k; }

  // Bytes of the codes from `column` on and byte row `row` on; a strip of integers is cut
  // at whole dwords per column.
  const uint8_t* codes_at(int64_t row, int64_t column) const {
    if (!strips) return codes + row * n + column;
    const int64_t within = column % kStrip * (kind == Kind::integer ? 4 : 1);
    return codes + (column / kStrip * strip_rows + row) * kStrip + within;
  }
  // Index of a scale or zero-point.
  int64_t scale_at(int64_t group, int64_t column) const {
    if (!strips) return group * n + column;
    return (column / kStrip * groups + group) * kStrip + column % kStrip;
  }

  // Quantized x of a row and block.
  int32_t* xq_of(const Block& block, int64_t row) const {
    return xq + (block.dword * m + row * block.dwords) * halves;
  }
};

struct AttentionCall;
struct SelfCall;

struct Engine {
  const char* name;
  int strip;
  int64_t planes;  // dwords of x per tile from which `forward` wants planes, 0 for never
  int byte_bits;   // widest codes that meet int8 activations as bytes
  // One row of activations.
  void (*prepare)(const Call&, float* xf, int64_t row);
  // Rows [m0, m1) and columns [c0, c1) of the result; c0 is a multiple of `strip`.
  void (*forward)(const Call&, int64_t m0, int64_t m1, int64_t c0, int64_t c1);
  // Rows [m0, m1) of the result of x W^T, the columns of one block.
  void (*transposed)(const Call&, int64_t m0, int64_t m1, const Block&);
  // The queries of one row and key head, `item` of batch * kv_heads.
  void (*attend)(const AttentionCall&, int64_t item);
  // The same of tokens to themselves, or the gradient of it.
  void (*attend_self)(const SelfCall&, int64_t item);
};

// The engine of the instruction set in use.
const Engine& engine();

constexpr int64_t kBlock = 256;       // most rows of W in a block: 255 * 32512 * 256 < 2^31
constexpr int64_t kFloatBlock = 128;  // of a float panel: 32 kB at 64 columns
constexpr int64_t kFewRows = 16;      // of x, which the second-level cache holds
constexpr int64_t kTileRows = 16;     // of a tile of a matrix unit, 64 bytes each
constexpr float kTop = 32512;         // 127 * 256: most of a quantized activation
constexpr float kE4m3 = 256;          // what values of E4M3 are divided by in panels

}  // namespace qjax
