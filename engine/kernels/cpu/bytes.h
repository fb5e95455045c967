// Activations beside int8 weights, on machines with vpdpbusd: a row is numbers of 16 bits times one scale, whose high and
// low bytes are multiplied apart. That is finer than bf16, and as fast: two instructions for four products a lane.
//
// A row of k numbers: [k / 4][high 4, low 4], padded with zeros, then `Tail`. A number x is scale * (256 * high + low), both
// bytes signed. The instruction takes one operand unsigned, here the weights plus 128; so 128 times the sum of the row is
// taken off again. Sums are exact in 32 bits for k up to 65,536 (255 * 128 * 65,536 < 2^31),
// which engine/backends/cpu.py checks.
//
// Example, largest |x| of the row 2, scale 2 / 32512: x = 1 is 16256 = 256 * 64 - 128: high 64, low -128.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace mixserve {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

enum class Bytes : int8_t {};

// Bytes ahead of the current place that are asked for while few rows are multiplied: there is too little work to hide
// the memory's latency behind.
constexpr int kPrefetchBytes = 2048, kPrefetchRows = 4;

struct Tail {
    float scale;
    int32_t high_sum, low_sum;
};

// Bytes of a row, a multiple of 64.
inline int bytes_stride(int k) { return ceil_div(8 * ceil_div(k, 4) + int(sizeof(Tail)), 64) * 64; }

#if defined(__AVX512VNNI__)

inline void convert(const float* from, int size, Bytes* row) {
    constexpr float kLargest = 32512;  // 127 * 256: what rounds up still has a high byte of 127
    __m512 top = _mm512_setzero_ps(), nan = top;
    auto part = [&](int i) {
        const __mmask16 mask = size - i >= kLanes ? 0xffff : __mmask16((1u << (size - i)) - 1);
        return _mm512_maskz_loadu_ps(mask, from + i);
    };
    for (int i = 0; i < size; i += kLanes) {
        const __m512 x = part(i);
        top = _mm512_max_ps(top, _mm512_abs_ps(x));
        nan = _mm512_add_ps(nan, _mm512_sub_ps(x, x));  // 0 but for numbers that are not finite
    }
    const float largest = _mm512_reduce_max_ps(top), spoiled = _mm512_reduce_add_ps(nan);
    const bool usable = largest > 1e-30f && spoiled == 0;  // less is 0, and has no inverse
    const __m512 inverse = _mm512_set1_ps(usable ? kLargest / largest : 0.0f);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
    char* to = reinterpret_cast<char*>(row);
    for (int i = 0; i < size; i += kLanes) {
        const __m512i x = usable ? _mm512_cvtps_epi32(_mm512_mul_ps(part(i), inverse)) : _mm512_setzero_si512();
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 8));
        high_sum = _mm512_add_epi32(high_sum, high);
        low_sum = _mm512_add_epi32(low_sum, low);
        const __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
        alignas(64) char fours[2 * kLanes];
        _mm_store_si128(reinterpret_cast<__m128i*>(fours), _mm_unpacklo_epi32(h, l));
        _mm_store_si128(reinterpret_cast<__m128i*>(fours + kLanes), _mm_unpackhi_epi32(h, l));
        std::memcpy(to + 2 * i, fours, std::min(2 * kLanes, 8 * ceil_div(size - i, 4)));
    }
    // A row with a number that is not finite has no result that is.
    const Tail tail{usable ? largest / kLargest : spoiled, _mm512_reduce_add_epi32(high_sum), _mm512_reduce_add_epi32(low_sum)};
    std::memcpy(to + 8 * ceil_div(size, 4), &tail, sizeof tail);
}

// acc[r][b] = rows r of x times blocks b of w (gemm.h), without the weights' scales.
template <int R, int B>
inline void multiply(const Bytes* const* x, const int8_t* w, size_t block, int k, V16 (&acc)[R][B]) {
    const int fours = ceil_div(k, 4);
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    __m512i high[R][B], low[R][B];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) high[r][b] = low[r][b] = _mm512_setzero_si512();
    for (int i = 0; i < fours; ++i) {
        __m512i columns[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const int8_t* column = w + b * block + size_t(i) * 4 * kLanes;
            if (R <= kPrefetchRows) prefetch(column + kPrefetchBytes);
            columns[b] = _mm512_xor_si512(_mm512_loadu_si512(column), flip);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t h, l;
            std::memcpy(&h, x[r] + 8 * i, 4);
            std::memcpy(&l, x[r] + 8 * i + 4, 4);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) {
                high[r][b] = _mm512_dpbusd_epi32(high[r][b], columns[b], _mm512_set1_epi32(h));
                low[r][b] = _mm512_dpbusd_epi32(low[r][b], columns[b], _mm512_set1_epi32(l));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        Tail tail;
        std::memcpy(&tail, x[r] + 8 * fours, sizeof tail);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const __m512 h = _mm512_cvtepi32_ps(_mm512_sub_epi32(high[r][b], _mm512_set1_epi32(128 * tail.high_sum)));
            const __m512 l = _mm512_cvtepi32_ps(_mm512_sub_epi32(low[r][b], _mm512_set1_epi32(128 * tail.low_sum)));
            acc[r][b] = mul({_mm512_fmadd_ps(h, _mm512_set1_ps(256), l)}, splat(tail.scale));
        }
    }
}

#endif

}  // namespace mixserve
