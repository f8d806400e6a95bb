"""A C library that computes with packed weights on the CPU, and its backend.

`packed.h` is the interface, `packed.c` checks and divides, `portable.c` and `avx2.c` compute.
`library` loads it through ctypes, `backend` makes it one of `cptq.inference.operations`.
"""
