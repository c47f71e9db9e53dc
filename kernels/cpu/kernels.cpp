// The kernel table of one ISA. setup.py compiles this file once per ISA, with that ISA's flags and FASTCONV_ISA set to its name.
#include "kernels/cpu/conv.h"
#include "kernels/cpu/depthwise.h"
#include "kernels/cpu/gradient.h"
#include "kernels/cpu/peak.h"
#include "kernels/cpu/pointwise.h"
#include "kernels/cpu/pool.h"
#include "kernels/cpu/stem_winograd.h"
#include "kernels/cpu/strassen.h"
#include "kernels/cpu/winograd_gradient.h"

#define FASTCONV_STRING_(x) #x
#define FASTCONV_STRING(x) FASTCONV_STRING_(x)

namespace fastconv::FASTCONV_ISA {

#if defined(FASTCONV_ISA_IS_AVX512)
#define FASTCONV_TILES "14x32, 8x48, 14x16"
#define FASTCONV_CONV_TILES "6x64, 8x48"
#define FASTCONV_CHANNELS "7x16"
#elif defined(FASTCONV_ISA_IS_AVX2)
#define FASTCONV_TILES "6x16, 12x8"
#define FASTCONV_CONV_TILES "6x16"
#define FASTCONV_CHANNELS "7x8"
#elif defined(FASTCONV_ISA_IS_NEON)
#define FASTCONV_TILES "6x16"
#define FASTCONV_CONV_TILES "6x16"
#define FASTCONV_CHANNELS "7x4"
#else
#define FASTCONV_TILES "2x16"
#define FASTCONV_CONV_TILES "2x16"
#define FASTCONV_CHANNELS "7x4"
#endif

extern const Kernels kernels;
const Kernels kernels{FASTCONV_STRING(FASTCONV_ISA),
                      {{"pointwise", FASTCONV_TILES},
                       {"conv", FASTCONV_CONV_TILES},
                       {"padded_conv", FASTCONV_TILES},
                       {"winograd", FASTCONV_TILES},
                       {"stem", FASTCONV_TILES},
                       {"depthwise", FASTCONV_CHANNELS},
                       {"max_pool", "1 pixel, one vector"},
                       {"global_avg_pool", "one vector"}},
                      max_rows<PREFERRED_NV>(),
                      max_rows<PREFERRED_NV>() * PREFERRED_NV * W * UNROLL,
                      pointwise,
                      conv,
                      padded_conv,
                      strassen_transform,
                      strassen_multiply,
                      strassen_floats,
                      strassen_scratch,
                      nullptr,
                      nullptr,
                      winograd,
                      winograd_scratch,
                      winograd_transformed,
                      winograd_transform,
                      winograd_multiply,
                      WINOGRAD_SUMS,
                      all_moderate,
                      stem,
                      stem_winograd,
                      stem_ring_floats,
                      depthwise,
                      max_pool,
                      sum_pixels,
                      sum_rows,
                      scale_channels,
                      activated,
                      activated_exactly,
                      moments,
                      gradient,
                      gradient_sums,
                      through_activation,
                      through_gate,
                      product_gradient,
                      depthwise_gradient,
                      max_pool_gradient,
                      window_inputs,
                      window_gradients,
                      window_taps,
                      fma_chains,
                      read_stream,
                      copy_stream};

}  // namespace fastconv::FASTCONV_ISA
