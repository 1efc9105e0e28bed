// Attention of tokens to themselves on CPUs and its gradient, as XLA FFI handlers.

#include <string>

#include "attention_call.h"
#include "ffi.h"
#include "operands.h"
#include "team.h"

namespace qjax {
namespace {

namespace ffi = xla::ffi;

ffi::Error bad(const std::string& what) {
  return ffi::Error::InvalidArgument("qjax native self-attention: " + what);
}

bool floats(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  return buffer.element_type() == ffi::DataType::F32 && shaped(buffer, shape);
}

// What both handlers are given; an empty string, or what is wrong.
std::string read(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k,
                 const ffi::AnyBuffer& v, const ffi::AnyBuffer& positions,
                 const ffi::AnyBuffer& segments, const ffi::AnyBuffer& window,
                 const ffi::AnyBuffer& factor, SelfCall* c) {
  const auto shape = q.dimensions();
  if (shape.size() != 4 || k.dimensions().size() != 4) return "q and k need rank 4";
  c->batch = shape[0], c->time = shape[1], c->heads = shape[2], c->width = shape[3];
  c->kv_heads = k.dimensions()[1];
  const auto own = {c->batch, c->kv_heads, c->time, c->width};
  if (!floats(q, {c->batch, c->time, c->heads, c->width}) || !floats(k, own) ||
      !floats(v, own)) {
    return "q, k and v have to be float32 of fitting shapes";
  }
  if (!c->kv_heads || c->heads % c->kv_heads) return "heads do not divide";
  for (const auto* numbers : {&positions, &segments}) {
    if (numbers->element_type() != ffi::DataType::S32 ||
        !shaped(*numbers, {c->batch, c->time})) {
      return "positions and segments have to be int32 [batch, time]";
    }
  }
  if (window.element_type() != ffi::DataType::S32 || window.element_count() != 1 ||
      factor.element_type() != ffi::DataType::F32 || factor.element_count() != 1) {
    return "window and factor have to be one int32 and one float32";
  }
  c->q = static_cast<const float*>(q.untyped_data());
  c->k = static_cast<const float*>(k.untyped_data());
  c->v = static_cast<const float*>(v.untyped_data());
  c->positions = static_cast<const int32_t*>(positions.untyped_data());
  c->segments = static_cast<const int32_t*>(segments.untyped_data());
  c->window = *static_cast<const int32_t*>(window.untyped_data());
  c->factor = *static_cast<const float*>(factor.untyped_data());
  return "";
}

ffi::Error run(const SelfCall& c, ffi::ThreadPool& pool) {
  const Engine& engine = qjax::engine();
  const bool good = parallel(pool, pool.num_threads(), c.batch * c.kv_heads,
                             [&](int64_t i) { engine.attend_self(c, i); });
  if (good) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "qjax native self-attention: no memory");
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                   ffi::AnyBuffer v, ffi::AnyBuffer positions, ffi::AnyBuffer segments,
                   ffi::AnyBuffer window, ffi::AnyBuffer factor,
                   ffi::Result<ffi::AnyBuffer> y) {
  SelfCall c;
  const std::string fault = read(q, k, v, positions, segments, window, factor, &c);
  if (!fault.empty()) return bad(fault);
  if (!floats(*y, {c.batch, c.time, c.heads, c.width})) return bad("the result is not like q");
  c.y = static_cast<float*>(y->untyped_data());
  return run(c, pool);
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                    ffi::AnyBuffer v, ffi::AnyBuffer positions, ffi::AnyBuffer segments,
                    ffi::AnyBuffer window, ffi::AnyBuffer factor, ffi::AnyBuffer dy,
                    ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                    ffi::Result<ffi::AnyBuffer> dv) {
  SelfCall c;
  const std::string fault = read(q, k, v, positions, segments, window, factor, &c);
  if (!fault.empty()) return bad(fault);
  const auto outer = {c.batch, c.time, c.heads, c.width};
  const auto inner = {c.batch, c.kv_heads, c.time, c.width};
  if (!floats(dy, outer) || !floats(*dq, outer) || !floats(*dk, inner) ||
      !floats(*dv, inner)) {
    return bad("gradients are not like q, k and v");
  }
  c.dy = static_cast<const float*>(dy.untyped_data());
  c.dq = static_cast<float*>(dq->untyped_data());
  c.dk = static_cast<float*>(dk->untyped_data());
  c.dv = static_cast<float*>(dv->untyped_data());
  return run(c, pool);
}

}  // namespace
}  // namespace qjax

QJAX_EXPORT XLA_FFI_Error* qjax_self_attention(XLA_FFI_CallFrame*);
QJAX_EXPORT XLA_FFI_Error* qjax_self_attention_gradient(XLA_FFI_CallFrame*);

using Any = xla::ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_self_attention, qjax::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Any>()   // q
                                  .Arg<Any>()   // k
                                  .Arg<Any>()   // v
                                  .Arg<Any>()   // positions
                                  .Arg<Any>()   // segments
                                  .Arg<Any>()   // window
                                  .Arg<Any>()   // factor
                                  .Ret<Any>());  // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_self_attention_gradient, qjax::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Any>()   // q
                                  .Arg<Any>()   // k
                                  .Arg<Any>()   // v
                                  .Arg<Any>()   // positions
                                  .Arg<Any>()   // segments
                                  .Arg<Any>()   // window
                                  .Arg<Any>()   // factor
                                  .Arg<Any>()   // dy
                                  .Ret<Any>()   // dq
                                  .Ret<Any>()   // dk
                                  .Ret<Any>());  // dv
