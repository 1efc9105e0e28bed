// Attention of few queries over a cache of floats or codes on CPUs, as an XLA FFI handler.

#include <string>

#include "attention_call.h"
#include "ffi.h"
#include "operands.h"
#include "team.h"

namespace qjax {
namespace {

namespace ffi = xla::ffi;

ffi::Error bad(const std::string& what) {
  return ffi::Error::InvalidArgument("qjax native attention: " + what);
}

// A cache `[batch, kv_heads, a, b]`, or the layer of a stack of them.
bool stored(const ffi::AnyBuffer& buffer, int64_t layer, int64_t layers,
            const AttentionCall& c, int64_t a, int64_t b, Array* out) {
  const bool fits = layers < 0
                        ? shaped(buffer, {c.batch, c.kv_heads, a, b})
                        : shaped(buffer, {layers, c.batch, c.kv_heads, a, b});
  out->type = type_of(buffer.element_type());
  const int64_t skip = layers < 0 ? 0 : layer * c.batch * c.kv_heads * a * b;
  out->data = static_cast<const uint8_t*>(buffer.untyped_data()) +
              skip * int64_t(size_of(out->type));
  return fits && out->type != Type::none;
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::AnyBuffer scale, ffi::AnyBuffer queries,
                     ffi::AnyBuffer positions, ffi::AnyBuffer window,
                     ffi::AnyBuffer factor, ffi::AnyBuffer layer,
                     ffi::Result<ffi::AnyBuffer> y, float softcap) {
  AttentionCall c;
  const auto shape = q.dimensions(), cache = keys.dimensions();
  if (shape.size() != 4 || (cache.size() != 4 && cache.size() != 5)) {
    return bad("q needs rank 4, keys rank 4 or 5");
  }
  c.batch = shape[0], c.heads = shape[1], c.time = shape[2], c.width = shape[3];
  c.kv_heads = cache[cache.size() - 3], c.length = cache[cache.size() - 2];
  c.row = cache[cache.size() - 1];
  c.q = {q.untyped_data(), type_of(q.element_type())};
  if (!is_float(c.q.type) || y->element_type() != q.element_type() ||
      !shaped(*y, {c.batch, c.heads, c.time, c.width})) {
    return bad("q has to be float, the result like q");
  }
  if (c.width % kWidths || !c.kv_heads || c.heads % c.kv_heads) {
    return bad("heads do not divide");
  }
  const int64_t layers = cache.size() == 5 ? cache[0] : -1;
  int64_t at = 0;
  const std::string fault = read_layer(layer, layers, &at);
  if (!fault.empty()) return bad(fault);
  if (!stored(keys, at, layers, c, c.length, c.row, &c.keys)) return bad("the cache does not fit q");
  const bool coded = !is_float(c.keys.type);
  c.values = c.keys;
  c.nibbles = c.keys.type == Type::u8;
  c.value_at = coded && !c.nibbles ? c.width : 0;
  if (c.row != c.width + c.value_at) return bad("rows of the cache do not fit heads of q");
  if (!coded) {
    if (!stored(values, at, layers, c, c.length, c.row, &c.values) ||
        c.values.type != c.keys.type) {
      return bad("values are not like keys");
    }
  } else if (!stored(scale, at, layers, c, 2, c.length, &c.scale) ||
             !is_float(c.scale.type)) {
    return bad("scale has another shape or type than float [batch, kv_heads, 2, length]");
  }
  if (queries.element_type() != ffi::DataType::S32 ||
      positions.element_type() != ffi::DataType::S32 ||
      window.element_type() != ffi::DataType::S32 ||
      factor.element_type() != ffi::DataType::F32 || window.element_count() != 1 ||
      factor.element_count() != 1 || !shaped(queries, {c.batch, c.time}) ||
      !shaped(positions, {c.batch, c.length})) {
    return bad("queries, positions, window or factor have another shape or type");
  }
  c.queries = static_cast<const int32_t*>(queries.untyped_data());
  c.positions = static_cast<const int32_t*>(positions.untyped_data());
  c.window = *static_cast<const int32_t*>(window.untyped_data());
  c.factor = *static_cast<const float*>(factor.untyped_data());
  c.softcap = softcap;
  c.y = y->untyped_data();
  const Engine& engine = qjax::engine();
  const bool good = parallel(pool, pool.num_threads(), c.batch * c.kv_heads,
                             [&](int64_t i) { engine.attend(c, i); });
  if (good) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax native attention: no memory");
}

}  // namespace
}  // namespace qjax

QJAX_EXPORT XLA_FFI_Error* qjax_attention(XLA_FFI_CallFrame*);

using Any = xla::ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_attention, qjax::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Any>()   // q
                                  .Arg<Any>()   // keys, or codes of keys and values
                                  .Arg<Any>()   // values
                                  .Arg<Any>()   // scale
                                  .Arg<Any>()   // queries
                                  .Arg<Any>()   // positions
                                  .Arg<Any>()   // window
                                  .Arg<Any>()   // factor
                                  .Arg<Any>()   // layer
                                  .Ret<Any>()   // y
                                  .Attr<float>("softcap"));
