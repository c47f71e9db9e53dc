"""Kernel sources: cpu/ (C++20, compiled into fastconv._C) and gpu/ (Triton)."""
