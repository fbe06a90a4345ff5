"""Builds every C type and function of `fabric._native` once, while one thread is at it.

cffi builds them when they are first used. Two threads that do so at once abort the process: seen
with cffi 2.1.1, an assertion in ``realize_c_type_or_func_lock_held``, in a program whose threads
each used an engine for the first time. Importing this module leaves nothing to be built later.
"""

from __future__ import annotations

from ._native import ffi, lib

OPAQUE = {"fab_engine"}  # of which only pointers exist
PLAIN = ("char", "char *", "uint8_t", "int32_t", "int64_t", "uint64_t", "uintptr_t")


def _realize() -> None:
    for name in dir(lib):
        getattr(lib, name)
    for names in ffi.list_types():
        for name in sorted(set(names) - OPAQUE):
            dir(ffi.new(f"{name} *"))  # listing the fields builds them
            ffi.typeof(f"{name}[]")
    for name in PLAIN:
        ffi.typeof(f"{name} *")
        ffi.typeof(f"{name}[]")


_realize()
