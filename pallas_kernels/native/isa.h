// What code for several instruction sets is written with.

#pragma once

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define PREFETCH(p) __builtin_prefetch(p)
#define PREFETCH_FAR(p) __builtin_prefetch(p, 0, 2)  // to the second-level cache
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

// -DQJAX_PLAIN leaves the code for vector units out: quick to build, slow to run.
#if defined(__x86_64__) && !defined(QJAX_PLAIN)
#define QJAX_X86 1
#include <immintrin.h>
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define QJAX_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && !defined(QJAX_PLAIN)
#define QJAX_ARM 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#define QJAX_TEXT(x) #x
#if defined(__clang__)
#define QJAX_TARGET(features)                                                     \
  _Pragma(QJAX_TEXT(clang attribute push(__attribute__((target(features))), \
                                         apply_to = function)))
#define QJAX_TARGET_END _Pragma("clang attribute pop")
#else
#define QJAX_TARGET(features) \
  _Pragma("GCC push_options") _Pragma(QJAX_TEXT(GCC target(features)))
#define QJAX_TARGET_END _Pragma("GCC pop_options")
#endif
