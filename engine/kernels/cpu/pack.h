// Weights into the layout of gemm.h, and rows of them back.
//
// In every layout a block is a transpose of 16 rows of 32-bit words: a word is a float, a pair of bf16 or four bytes,
// all along k. Example, bf16: row n's word p holds k = 2 p and 2 p + 1, and becomes word n of line p, which has 64 bytes.
#pragma once

#include "model.h"

namespace mixserve {

constexpr int kLineWords = 16;  // words of a row that are transposed at once: a line of memory

// Numbers of a row in a word.
template <class W>
constexpr int kPerWord = int(sizeof(uint32_t) / sizeof(W));

inline float as_float(float x) { return x; }
inline float as_float(bf16 x) { return to_float(x); }

// The bits of |x| as a float: they are ordered as the numbers are.
inline int32_t magnitude(bf16 x) { return (int32_t(x) & 0x7fff) << 16; }
inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

// The largest |x| of a row; NaN if there is one.
template <class S>
inline float largest_of(const S* from, int size) {
    int32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < size; ++i) top = std::max(top, magnitude(from[i]));
    float largest;
    std::memcpy(&largest, &top, 4);
    return largest;
}

// `size` numbers in the type of the weights. int8 are multiples of the row's scale.
inline void narrow(const bf16* from, int size, float, bf16* to) { std::memcpy(to, from, size * sizeof(bf16)); }
inline void narrow(const float* from, int size, float, bf16* to) {
    for (int i = 0; i < size; ++i) to[i] = to_bf16(from[i]);
}
template <class S>
inline void narrow(const S* from, int size, float, float* to) {
    for (int i = 0; i < size; ++i) to[i] = as_float(from[i]);
}
template <class S>
inline void narrow(const S* from, int size, float scale, int8_t* to) {
    // Beside 1.5 * 2^23 a float's last place is 1: adding rounds to an integer, ties to even, into the lowest bits.
    constexpr float kRound = 12582912.0f;
#pragma omp simd
    for (int i = 0; i < size; ++i) {
        const float rounded = as_float(from[i]) / scale + kRound;
        uint32_t bits;
        std::memcpy(&bits, &rounded, 4);
        to[i] = int8_t(bits);
    }
}

// Rows [0, num_rows) of a block, at most 16, from k numbers each at `from`; the rest of the block becomes 0. `scales`
// are written for int8 alone.
template <class W, class S>
inline void pack_block(const S* from, int num_rows, int k, W* to, float* scales) {
    constexpr int kNumbers = kLineWords * kPerWord<W>;
    alignas(64) W tile[kLanes][kNumbers] = {};
    float scale[kLanes] = {};
    if (std::is_same_v<W, int8_t>)
        for (int r = 0; r < num_rows; ++r) scales[r] = scale[r] = largest_of(from + size_t(r) * k, k) / 127.0f;
    for (int first = 0; first < k; first += kNumbers) {
        const int numbers = std::min(kNumbers, k - first), words = ceil_div(numbers, kPerWord<W>);
        if (numbers < kNumbers) std::memset(tile, 0, sizeof tile);
        for (int r = 0; r < num_rows; ++r) {
            if (std::is_same_v<W, int8_t> && !(scale[r] > 0)) continue;
            narrow(from + size_t(r) * k + first, numbers, scale[r], tile[r]);
        }
        for (int w = 0; w < words; ++w)
            for (int r = 0; r < kLanes; ++r, to += kPerWord<W>)
                std::memcpy(to, tile[r] + w * kPerWord<W>, sizeof(uint32_t));
    }
}

// Rows of [rows][k] into blocks: row r becomes column (first + r) % 16 of block base + (first + r) / 16 * step. `first`
// is a multiple of 16.
template <class W, class S>
void pack(const S* from, int num_rows, int k, int first, int base, int step, W* packed, float* scales) {
#pragma omp parallel for schedule(static)
    for (int b = 0; b < ceil_div(num_rows, kLanes); ++b) {
        const size_t block = size_t(base) + size_t(first / kLanes + b) * step;
        pack_block(from + size_t(b) * kLanes * k, std::min(kLanes, num_rows - b * kLanes), k,
                   packed + block * block_elements<W>(k), scales ? scales + block * kLanes : nullptr);
    }
}

// Row n of packed weights as float: y [k].
inline void unpack_row(const void* packed, const float* scales, int weight_type, int k, int64_t n, float* y) {
    const size_t block = size_t(n) / kLanes, lane = size_t(n) % kLanes;
    for (int i = 0; i < k; ++i) {
        if (weight_type == kBf16)
            y[i] = to_float(static_cast<const bf16*>(packed)[block * block_elements<bf16>(k) + (size_t(i) / 2 * kLanes + lane) * 2 + i % 2]);
        else if (weight_type == kFloat)
            y[i] = static_cast<const float*>(packed)[block * block_elements<float>(k) + size_t(i) * kLanes + lane];
        else
            y[i] = static_cast<const int8_t*>(packed)[block * block_elements<int8_t>(k) + (size_t(i) / 4 * kLanes + lane) * 4 + i % 4] * scales[n];
    }
}

}  // namespace mixserve
