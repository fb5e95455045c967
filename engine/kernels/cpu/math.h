// Element-wise functions of rows.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"

namespace mixserve {

// e^x, to 2 units in the last place; 0 below -87, and a NaN stays one. By 2^n * 2^f with |f| <= 1/2 and a polynomial for 2^f.
inline V16 exp(V16 x) {
    const V16 t = mul(clamp(x, -87.0f, 88.0f), splat(1.44269504f)), n = nearest(t), f = sub(t, n);
    V16 p = splat(1.535336188e-4f);
    for (float c : {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f}) p = fma(p, f, splat(c));
    return zero_below(x, -87.0f, times_power_of_two(p, n));
}

inline V16 silu_mul(V16 gate, V16 up) {
    return div(mul(gate, up), add(splat(1.0f), exp(sub(zero(), gate))));
}

inline float dot(const float* a, const float* b, int size) {
    V16 total = zero();
    float rest = 0;
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) total = fma(load(a + i), load(b + i), total);
    for (; i < size; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

// y = x / rms(x) * weight, in float (Zhang and Sennrich 2019).
inline void rms_norm(const float* x, const float* weight, int size, float eps, float* y) {
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / float(size) + eps);
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) store(y + i, mul(mul(load(x + i), splat(scale)), load(weight + i)));
    for (; i < size; ++i) y[i] = x[i] * scale * weight[i];
}

}  // namespace mixserve
