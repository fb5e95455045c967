// A vector of 16 floats, in the widest instructions that this translation unit is compiled for.
//
// Scalar, AVX2, AVX512, or AVX512 with BF16: setup.py compiles kernels.cpp once for each.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mixserve {

using bf16 = uint16_t;

constexpr int kLanes = 16;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct V16 {
    __m512 v;
};

inline V16 zero() { return {_mm512_setzero_ps()}; }
inline V16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
inline V16 add(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V16 sub(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V16 mul(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V16 div(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline float sum(V16 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(V16 a) { return _mm512_reduce_max_ps(a.v); }

// 2^x = 2^n * p(x - n) for the nearest integer n; a NaN stays one.
inline V16 nearest(V16 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V16 times_power_of_two(V16 x, V16 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// low where x < low, high where x > high; 0 where x < low.
inline V16 clamp(V16 x, float low, float high) {
    return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x.v))};
}
inline V16 zero_below(V16 x, float low, V16 value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(low), _CMP_NLT_UQ), value.v)};
}

inline V16 load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

// Byte i of each of the 16 fours at p.
inline V16 byte_of_four(const int8_t* p, int i) {
    const __m512i fours = _mm512_loadu_si512(p);
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(fours, _mm_cvtsi32_si128(24 - 8 * i)), 24))};
}

inline void store(bf16* p, V16 a) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
#else
    alignas(64) float lanes[kLanes];
    _mm512_store_ps(lanes, a.v);
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(lanes[i]);
#endif
}

// acc[i] += w[2i] * x[0] + w[2i + 1] * x[1], for the 16 pairs at w and the one pair in x.
inline V16 dot2(V16 acc, const bf16* w, uint32_t x) {
    __m512i pairs = _mm512_loadu_si512(w);
    __m512i both = _mm512_set1_epi32(int(x));
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(both))};
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    auto first = [](__m512i p) { return _mm512_castsi512_ps(_mm512_slli_epi32(p, 16)); };
    auto second = [&](__m512i p) { return _mm512_castsi512_ps(_mm512_and_epi32(p, high)); };
    return {_mm512_fmadd_ps(second(pairs), second(both), _mm512_fmadd_ps(first(pairs), first(both), acc.v))};
#endif
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Lane j is the sum of the 16 numbers from p + 16 j on. Each step adds neighbours and halves the vectors.
inline V16 sum_rows(const float* p) {
    __m512 fours[4];
    for (int i = 0; i < 4; ++i) {
        __m512d pairs[2];
        for (int j = 0; j < 2; ++j) {
            __m512 a = _mm512_load_ps(p + (4 * i + 2 * j) * kLanes), b = _mm512_load_ps(p + (4 * i + 2 * j + 1) * kLanes);
            pairs[j] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        }
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
    }
    auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return {halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]))};
}

constexpr int kMaxRows = 6, kMaxBlocks = 4;    // of a product: 24 accumulators of 32 registers
constexpr int kMaxHeads = 4, kMaxVectors = 4;  // of a decode: 16

#elif defined(__AVX2__)

struct V16 {
    __m256 a, b;
};

inline V16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline V16 add(V16 x, V16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V16 sub(V16 x, V16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V16 mul(V16 x, V16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V16 fma(V16 x, V16 y, V16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V16 max(V16 x, V16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }

inline V16 div(V16 x, V16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline float largest(V16 x) {
    alignas(32) float lanes[kLanes / 2];
    _mm256_store_ps(lanes, _mm256_max_ps(x.a, x.b));
    float top = lanes[0];
    for (float lane : lanes) top = lane > top ? lane : top;
    return top;
}
inline V16 nearest(V16 x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
inline V16 times_power_of_two(V16 x, V16 n) {
    auto half = [](__m256 value, __m256 power) {
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23)));
    };
    return {half(x.a, n.a), half(x.b, n.b)};
}
inline V16 clamp(V16 x, float low, float high) {
    const __m256 l = _mm256_set1_ps(low), h = _mm256_set1_ps(high);
    return {_mm256_min_ps(h, _mm256_max_ps(l, x.a)), _mm256_min_ps(h, _mm256_max_ps(l, x.b))};
}
inline V16 zero_below(V16 x, float low, V16 value) {
    const __m256 l = _mm256_set1_ps(low);
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, l, _CMP_NLT_UQ), value.a), _mm256_and_ps(_mm256_cmp_ps(x.b, l, _CMP_NLT_UQ), value.b)};
}

inline float sum(V16 x) {
    __m256 both = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline V16 load(const bf16* p) {
    auto half = [](const bf16* q) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {half(p), half(p + 8)};
}

inline V16 byte_of_four(const int8_t* p, int i) {
    auto half = [&](const int8_t* q) {
        const __m256i fours = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(fours, _mm_cvtsi32_si128(24 - 8 * i)), 24));
    };
    return {half(p), half(p + 32)};
}

inline void store(bf16* p, V16 x) {
    alignas(32) float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(lanes[i]);
}

inline V16 dot2(V16 acc, const bf16* w, uint32_t x) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000)), both = _mm256_set1_epi32(int(x));
    auto first = [](__m256i p) { return _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)); };
    auto second = [&](__m256i p) { return _mm256_castsi256_ps(_mm256_and_si256(p, high)); };
    auto half = [&](__m256 sum, const bf16* q) {
        __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
        return _mm256_fmadd_ps(second(pairs), second(both), _mm256_fmadd_ps(first(pairs), first(both), sum));
    };
    return {half(acc.a, w), half(acc.b, w + 16)};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline V16 sum_rows(const float* p) {
    auto eight = [](const float* q) {
        __m256 fours[2];
        for (int i = 0; i < 2; ++i) {
            auto row = [&](int r) { return _mm256_add_ps(_mm256_load_ps(q + (4 * i + r) * kLanes), _mm256_load_ps(q + (4 * i + r) * kLanes + 8)); };
            fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(row(0), row(1)), _mm256_hadd_ps(row(2), row(3)));
        }
        return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
    };
    return {eight(p), eight(p + 8 * kLanes)};
}

constexpr int kMaxRows = 3, kMaxBlocks = 2;    // of a product: 12 accumulators of 16 registers
constexpr int kMaxHeads = 2, kMaxVectors = 2;  // of a decode: 8

#else

struct V16 {
    float lane[kLanes];
};

template <class F>
inline V16 each(F f) {
    V16 r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = f(i);
    return r;
}

inline V16 zero() { return each([](int) { return 0.0f; }); }
inline V16 splat(float x) { return each([=](int) { return x; }); }
inline V16 load(const float* p) { return each([=](int i) { return p[i]; }); }
inline V16 load(const bf16* p) { return each([=](int i) { return to_float(p[i]); }); }
inline V16 byte_of_four(const int8_t* p, int j) { return each([=](int i) { return float(p[4 * i + j]); }); }
inline void store(float* p, V16 a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline void store(bf16* p, V16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(a.lane[i]);
}
inline V16 add(V16 a, V16 b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline V16 sub(V16 a, V16 b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline V16 mul(V16 a, V16 b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline V16 fma(V16 a, V16 b, V16 c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
inline V16 max(V16 a, V16 b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline V16 div(V16 a, V16 b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline float largest(V16 a) {
    float top = a.lane[0];
    for (float x : a.lane) top = x > top ? x : top;
    return top;
}
inline V16 nearest(V16 x) { return each([&](int i) { return std::nearbyint(x.lane[i]); }); }
inline V16 times_power_of_two(V16 x, V16 n) { return each([&](int i) { return std::ldexp(x.lane[i], int(n.lane[i])); }); }
inline V16 clamp(V16 x, float low, float high) {
    return each([&](int i) { return x.lane[i] < low ? low : x.lane[i] > high ? high : x.lane[i]; });
}
inline V16 zero_below(V16 x, float low, V16 value) {
    return each([&](int i) { return x.lane[i] < low ? 0.0f : value.lane[i]; });
}
inline float sum(V16 a) {
    float total = 0;
    for (float x : a.lane) total += x;
    return total;
}
inline V16 dot2(V16 acc, const bf16* w, uint32_t x) {
    float first = to_float(bf16(x)), second = to_float(bf16(x >> 16));
    return each([&](int i) { return acc.lane[i] + to_float(w[2 * i]) * first + to_float(w[2 * i + 1]) * second; });
}
inline void prefetch(const void*) {}
inline V16 sum_rows(const float* p) {
    return each([&](int j) { return sum(load(p + j * kLanes)); });
}

constexpr int kMaxRows = 2, kMaxBlocks = 2;
constexpr int kMaxHeads = 2, kMaxVectors = 2;

#endif

}  // namespace mixserve
