// What buffers of XLA are to kernels.

#pragma once

#include <initializer_list>

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

}  // namespace qjax
