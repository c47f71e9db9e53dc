// The operator table: every schema, and the CPU kernel behind it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastconv, m) {
#define SCHEMA(text) m.def(text);
#include "fastconv/schemas.inc"
#undef SCHEMA
}
