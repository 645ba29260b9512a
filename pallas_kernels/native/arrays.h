// Arrays as XLA hands them over.

#pragma once

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Of an optional array, which has no element when it is not given.
inline const void* DataOrNull(const ffi::AnyBuffer& x) { return x.element_count() ? x.untyped_data() : nullptr; }
template <ffi::DataType type>
auto DataOrNull(const ffi::Buffer<type>& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

// Calls run(a number of that type) and returns what it returns.
template <typename F>
ffi::Error OfFloats(ffi::DataType type, const F& run) {
  switch (type) {
    case ffi::F32: return run(float{});
    case ffi::BF16: return run(BFloat16{});
    case ffi::F16: return run(Half{});
    default: return ffi::Error::Internal("an array that is to be of floats is not");
  }
}

}  // namespace
