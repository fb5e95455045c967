// Matrix products with packed weights: y[m][n] = sum_k x[m][k] * w[n][k].
//
// Packed weights are blocks of 16 output columns, each block contiguous, so that a thread streams through memory:
//
//     bf16     [N / 16][K / 2][16][2]   pairs along k, as vdpbf16ps wants them; x is bf16
//     float    [N / 16][K][16]          x is float
//     int8     [N / 16][K / 4][16][4]   fours along k, as vpdpbusd wants them; x is two bytes a number where the machine
//                                       has that instruction, float elsewhere; the result is multiplied by a scale a column
//
// N is padded to a multiple of 16 and K to a multiple of 2 or 4, with zeros.
//
// Example, bf16, N = 16, K = 4: weight (n, k) lies at ((k / 2) * 16 + n) * 2 + k % 2, so the first 64 bytes hold columns
// 0 to 15 for k = 0 and 1.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bytes.h"

namespace mixserve {

// Calls work(std::integral_constant<int, n>) for an n of 1 to N.
template <int N, class Work>
inline void with_constant(int n, Work work) {
    if (n == N) return work(std::integral_constant<int, N>{});
    if constexpr (N > 1) with_constant<N - 1>(n, work);
}

// The activations' type beside weights of type W. `Bytes` are numbers in two bytes each (bytes.h).
#if defined(__AVX512VNNI__)
using Int8Input = Bytes;
#else
using Int8Input = float;
#endif
template <class W>
using Input = std::conditional_t<std::is_same_v<W, bf16>, bf16, std::conditional_t<std::is_same_v<W, int8_t>, Int8Input, float>>;

// Elements of a block of 16 columns.
template <class W>
inline size_t block_elements(int k) {
    constexpr int kGroup = std::is_same_v<W, bf16> ? 2 : std::is_same_v<W, int8_t> ? 4 : 1;
    return size_t(kLanes) * kGroup * ceil_div(k, kGroup);
}

// A tile is rows times blocks, all of whose sums stay in registers. Bytes have two sums each.
template <class W>
constexpr int kRows = std::is_same_v<Input<W>, Bytes> ? 4 : kMaxRows;
template <class W>
constexpr int kBlocks = std::is_same_v<Input<W>, Bytes> ? 2 : kMaxBlocks;

// acc[r][b] += rows r of x times blocks b of w. bf16 rows are padded to even length. All of acc stays in registers,
// which it does only if its loops are unrolled.
template <int R, int B>
inline void multiply(const bf16* const* x, const bf16* w, size_t block, int k, V16 (&acc)[R][B]) {
    const int pairs = ceil_div(k, 2);
    for (int p = 0; p < pairs; ++p) {
        uint32_t pair[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) std::memcpy(&pair[r], x[r] + 2 * p, 4);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const bf16* column = w + b * block + size_t(p) * 32;
            if (R <= kPrefetchRows) prefetch(reinterpret_cast<const char*>(column) + kPrefetchBytes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][b] = dot2(acc[r][b], column, pair[r]);
        }
    }
}

template <int R, int B>
inline void multiply(const float* const* x, const float* w, size_t block, int k, V16 (&acc)[R][B]) {
    for (int i = 0; i < k; ++i) {
        V16 columns[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const float* column = w + b * block + size_t(i) * kLanes;
            if (R <= kPrefetchRows) prefetch(reinterpret_cast<const char*>(column) + kPrefetchBytes);
            columns[b] = load(column);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            V16 value = splat(x[r][i]);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) acc[r][b] = fma(columns[b], value, acc[r][b]);
        }
    }
}

template <int R, int B>
inline void multiply(const float* const* x, const int8_t* w, size_t block, int k, V16 (&acc)[R][B]) {
    for (int i = 0; i < k; ++i) {
        V16 columns[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const int8_t* four = w + b * block + size_t(i / 4) * 4 * kLanes;
            if (R <= kPrefetchRows && i % 4 == 0) prefetch(four + kPrefetchBytes);
            columns[b] = byte_of_four(four, i % 4);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            V16 value = splat(x[r][i]);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) acc[r][b] = fma(columns[b], value, acc[r][b]);
        }
    }
}

// Calls finish(first row, acc) for tiles of rows times B blocks. `x(r)` is the address of row r.
template <int B, class W, class X, class Finish>
inline void row_tiles(int num_rows, X x, const W* w, size_t block, int k, Finish finish) {
    // Tiles as equal as they can be: 8 rows are 4 + 4, not 6 + 2.
    const int num_tiles = ceil_div(num_rows, kRows<W>);
    for (int t = 0; t < num_tiles; ++t) {
        const int first = int(int64_t(num_rows) * t / num_tiles), rows = int(int64_t(num_rows) * (t + 1) / num_tiles) - first;
        with_constant<(B <= kBlocks<W> ? kRows<W> : 1)>(rows, [&](auto count) {
            constexpr int R = decltype(count)::value;
            const Input<W>* address[R];
            for (int r = 0; r < R; ++r) address[r] = x(first + r);
            V16 acc[R][B];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int b = 0; b < B; ++b) acc[r][b] = zero();
            multiply<R, B>(address, w, block, k, acc);
            finish(first, acc);
        });
    }
}

// As row_tiles, for `num_blocks` blocks from `w` on: finish(row, block, vector) is called once for each.
template <class W, class X, class Finish>
inline void columns(int num_rows, X x, const W* w, int num_blocks, int k, Finish finish) {
    const size_t block = block_elements<W>(k);
    auto part = [&](auto blocks, int first_block) {
        constexpr int B = decltype(blocks)::value;
        row_tiles<B>(num_rows, x, w + first_block * block, block, k, [&](int first, auto& acc) {
            for (size_t r = 0; r < std::extent_v<std::remove_reference_t<decltype(acc)>>; ++r)
                for (int b = 0; b < B; ++b) finish(first + int(r), first_block + b, acc[r][b]);
        });
    };
    int done = 0;
    if (num_rows == 1)  // as wide as can be: what it waits for is memory, in as many streams
        for (; done + kMaxBlocks <= num_blocks; done += kMaxBlocks) part(std::integral_constant<int, kMaxBlocks>{}, done);
    for (; done + kBlocks<W> <= num_blocks; done += kBlocks<W>) part(std::integral_constant<int, kBlocks<W>>{}, done);
    for (; done < num_blocks; ++done) part(std::integral_constant<int, 1>{}, done);
}

}  // namespace mixserve
