"""Triton kernels: one file per operation, `configs` (tile tables, pure Python) and `epilogue` (shared device code).

Nothing here is imported by `import fastconv`; only `configs` can be imported without triton.
"""
