// Element-wise functions of rows.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"

namespace mixserve {

// e^x for 16 numbers, to 2 units in the last place; 0 below -87. By 2^n * 2^f with |f| <= 1/2 and a polynomial for 2^f.
inline void exp16(float* x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    for (int i = 0; i < kLanes; ++i) {
        float clamped = x[i] > -87.0f ? x[i] : -87.0f;
        float t = (clamped < 88.0f ? clamped : 88.0f) * 1.44269504f;
        float shifted = t + kRound, f = t - (shifted - kRound);
        float p = 1.535336188e-4f;
        p = p * f + 1.339887440e-3f;
        p = p * f + 9.618437357e-3f;
        p = p * f + 5.550332548e-2f;
        p = p * f + 2.402264791e-1f;
        p = p * f + 6.931472028e-1f;
        p = p * f + 1.0f;
        int32_t bits, n;
        std::memcpy(&bits, &p, 4);
        std::memcpy(&n, &shifted, 4);
        bits += n << 23;  // the offset of kRound leaves the word at its top
        float result;
        std::memcpy(&result, &bits, 4);
        x[i] = x[i] > -87.0f ? result : (x[i] == x[i] ? 0.0f : x[i]);
    }
}

// silu(gate) * up, 16 numbers.
inline V16 silu_mul(V16 gate, V16 up) {
    alignas(64) float g[kLanes], e[kLanes], u[kLanes];
    store(g, gate);
    store(u, up);
    for (int i = 0; i < kLanes; ++i) e[i] = -g[i];
    exp16(e);
    for (int i = 0; i < kLanes; ++i) u[i] *= g[i] / (1.0f + e[i]);
    return load(u);
}

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { *p = to_bf16(x); }

// x / rms(x) * weight, in float (Zhang and Sennrich 2019); the result goes to each of the outputs that is not null.
template <class Out>
inline void rms_norm(const float* x, const float* weight, int size, float eps, Out* out, float* wide) {
    V16 squares = zero();
    float rest = 0;
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    for (; i < size; ++i) rest += x[i] * x[i];
    const float scale = 1.0f / std::sqrt((sum(squares) + rest) / float(size) + eps);
    for (i = 0; i + kLanes <= size; i += kLanes) {
        V16 value = mul(mul(load(x + i), splat(scale)), load(weight + i));
        if (out) store(out + i, value);
        if (wide) store(wide + i, value);
    }
    for (; i < size; ++i) {
        if (out) put(out + i, x[i] * scale * weight[i]);
        if (wide) wide[i] = x[i] * scale * weight[i];
    }
}

inline float dot(const float* a, const float* b, int size) {
    V16 total = zero();
    float rest = 0;
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) total = fma(load(a + i), load(b + i), total);
    for (; i < size; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

}  // namespace mixserve
