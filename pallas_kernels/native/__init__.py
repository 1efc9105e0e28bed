"""CPU kernels in C++, called through jax.ffi; absent without a compiler."""
