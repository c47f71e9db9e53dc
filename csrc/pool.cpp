// max_pool (3x3) and global_avg_pool.
#include "csrc/ops.h"

namespace fastconv {

namespace {

// As ATen: with ceil_mode the last window may hang over the far side, but must start inside the image or its near padding.
int64_t pooled_size(const char* op, const char* axis, int64_t size, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t extra = ceil_mode ? stride - 1 : 0;
  check(size + 2 * padding - 3 + extra >= 0, op, "x has no output pixels: ", axis, " ", size, " with padding ", padding,
        " is below the window's 3");
  int64_t out = (size + 2 * padding - 3 + extra) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  check(out > 0, op, "x has no output pixels: ", axis, " ", size, " with padding ", padding);
  return out;
}

}  // namespace

Tensor max_pool(Tensor x, Ints stride, Ints padding, bool ceil_mode) {
  const char* op = "max_pool";
  check_image(op, x);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check(padding[0] <= 1 && padding[1] <= 1, op, "padding must be at most 1, half the window, got (", padding[0], ", ", padding[1], ")");
  check(x.size(2) > 0 && x.size(3) > 0, op, "x has no pixels: ", shape_of{x});
  const int64_t out_height = pooled_size(op, "height", x.size(2), stride[0], padding[0], ceil_mode);
  const int64_t out_width = pooled_size(op, "width", x.size(3), stride[1], padding[1], ceil_mode);
  if (!covered(op, x)) return aten::formatted_like(aten::max_pool(x, stride, padding, ceil_mode), x);
  const Image in(x);
  Result out(in.n, in.c, out_height, out_width, x, Output::like_input);
  const MaxPool image{in.data, in.c, in.h, in.w, in.c, out_width, stride[0], stride[1], padding[0], padding[1], out.data(), in.c};
  run_max_pool(image, in.n, out_height, parallel());
  return out.done();
}

Tensor global_avg_pool(Tensor x) {
  const char* op = "global_avg_pool";
  check_image(op, x);
  check(x.size(2) > 0 && x.size(3) > 0, op, "x has no pixels: ", shape_of{x});
  if (!covered(op, x)) return aten::formatted_like(aten::global_avg_pool(x), x);
  const Image in(x);
  Result out(in.n, in.c, 1, 1, x, Output::like_input);
  run_global_avg_pool(in.data, in.n, in.h * in.w, in.c, out.data(), parallel());
  return out.done();
}

}  // namespace fastconv
