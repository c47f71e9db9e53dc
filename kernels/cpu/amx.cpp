// What a matrix unit does. setup.py compiles this file with AVX-512's and AMX's flags and FASTCONV_ISA set to amx; everything else of that
// ISA is AVX-512's (isa.cpp).
#include "kernels/cpu/digits.h"

namespace fastconv::amx {

extern void (*const split)(const Pointwise&, Range pixels, const DigitPixels& parts);
extern void (*const multiply)(const Pointwise&, Range pixels, Range panels, const DigitPixels& parts);
void (*const split)(const Pointwise&, Range pixels, const DigitPixels& parts) = digits_split;
void (*const multiply)(const Pointwise&, Range pixels, Range panels, const DigitPixels& parts) = digits_multiply;

}  // namespace fastconv::amx
