// What buffers of XLA are to kernels.

#pragma once

#include <initializer_list>
#include <string>

#include "call.h"
#include "ffi.h"

#define QJAX_EXPORT extern "C" __attribute__((visibility("default")))

namespace qjax {

inline Type type_of(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::DataType::F32:
      return Type::f32;
    case xla::ffi::DataType::BF16:
      return Type::bf16;
    case xla::ffi::DataType::F16:
      return Type::f16;
    case xla::ffi::DataType::F8E4M3FN:
      return Type::e4m3;
    case xla::ffi::DataType::U8:
      return Type::u8;
    case xla::ffi::DataType::S8:
      return Type::s8;
    default:
      return Type::none;
  }
}

inline bool is_float(Type type) {
  return type == Type::f32 || type == Type::bf16 || type == Type::f16;
}

inline bool shaped(const xla::ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  auto dims = buffer.dimensions();
  if (dims.size() != shape.size()) return false;
  size_t i = 0;
  for (int64_t size : shape) {
    if (dims[i++] != size) return false;
  }
  return true;
}

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : is_float(type) ? 2 : 1; }

// Reads which of `layers` of a stack is meant; there is no stack below 0. Returns what is
// wrong, or nothing.
inline std::string read_layer(const xla::ffi::AnyBuffer& layer, int64_t layers,
                              int64_t* at) {
  *at = 0;
  if (layers < 0) return "";
  if (layer.element_type() != xla::ffi::DataType::S32 || layer.element_count() != 1) {
    return "layer has to be one int32";
  }
  *at = *static_cast<const int32_t*>(layer.untyped_data());
  if (*at >= 0 && *at < layers) return "";
  return "layer " + std::to_string(*at) + " of " + std::to_string(layers);
}

}  // namespace qjax
