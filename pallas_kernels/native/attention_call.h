// What one call of attention over a cache is, shared by all instruction sets.

#pragma once

#include "call.h"

namespace qjax {

struct AttentionCall {
  int64_t batch = 0, heads = 0, kv_heads = 0, time = 0, length = 0, width = 0;
  Array q;           // [batch, heads, time, width]
  Array keys;        // [batch, kv_heads, length, row] of the layer
  Array values;      // the same; for a cache of codes, the same array as `keys`
  Array scale;       // [batch, kv_heads, 2, length] of the layer, or none
  int64_t row = 0;   // elements from one token to the next
  int64_t value_at = 0;  // element of a row where its value begins
  bool nibbles = false;  // keys in low, values in high nibbles
  const int32_t *queries = nullptr, *positions = nullptr;  // [batch, time], [.., length]
  int64_t window = 0;
  float factor = 1, softcap = 0;
  void* y = nullptr;  // as q
};

// Attention of whole rows of tokens to themselves, and its gradient; all float32.
struct SelfCall {
  int64_t batch = 0, heads = 0, kv_heads = 0, time = 0, width = 0;
  const float* q = nullptr;         // [batch, time, heads, width]
  const float *k = nullptr, *v = nullptr;  // [batch, kv_heads, time, width]
  const int32_t *positions = nullptr, *segments = nullptr;  // [batch, time]
  int64_t window = 0;
  float factor = 1;
  float* y = nullptr;               // as q, of the forward pass
  const float* dy = nullptr;        // as q, of the gradient
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;  // as q, k and v
};

constexpr int64_t kSlots = 64;  // of a cache, decoded at a time
constexpr int64_t kWidths = 16;  // widths of heads are multiples of it

}  // namespace qjax
