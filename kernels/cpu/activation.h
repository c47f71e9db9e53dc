// Activations, as data where they are clamps.
#pragma once

namespace fastconv {

enum class Activation { none, relu, relu6, hardswish, hardsigmoid, silu, sigmoid };

}  // namespace fastconv
