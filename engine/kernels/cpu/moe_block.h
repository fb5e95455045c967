// The second half of a layer: the experts.
#pragma once

#include <numeric>
#include <vector>

#include "model.h"

namespace mixserve {

// x += sum over k of weight * W2 (silu(W1 row) * W3 row), for the chosen experts of each row; -1 is none.
//
// Assignments are grouped by expert, in the order of engine/routing/plan.py, and added up in the order of the choices.
template <class W>
void moe_block(const Model& m, const Layer& layer, int T, int K, const float* normed, const int32_t* expert_ids,
               const float* weights, float* x, Workspace& space) {
    using In = Input<W>;
    const int D = m.hidden, F = m.intermediate, E = m.num_experts;
    const int in_stride = row_stride<W>(D), mid_blocks = ceil_div(F, kLanes), padded = mid_blocks * kLanes;
    const int mid_stride = std::is_same_v<In, Bytes> ? row_stride<W>(F) : padded;
    std::vector<int> offsets(E + 1, 0), place(size_t(T) * K, -1), token(size_t(T) * K);
    for (int i = 0; i < T * K; ++i)
        if (expert_ids[i] >= 0) ++offsets[expert_ids[i] + 1];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    std::vector<int> next(offsets.begin(), offsets.end() - 1);
    for (int i = 0; i < T * K; ++i) {
        if (expert_ids[i] < 0) continue;
        place[i] = next[expert_ids[i]]++;
        token[place[i]] = i / K;
    }
    const int A = offsets[E];
    std::vector<int> hit;
    for (int e = 0; e < E; ++e)
        if (offsets[e + 1] > offsets[e]) hit.push_back(e);

    // silu(gate) * up, in the type of products if that goes number by number.
    using Mid = std::conditional_t<std::is_same_v<In, Bytes>, float, In>;
    space.begin(sizeof(In) * (size_t(T) * in_stride + size_t(A) * mid_stride) +
                sizeof(float) * (size_t(A) * D + size_t(A) * padded) + 4096);
    In* input = space.take<In>(size_t(T) * in_stride);
    In* middle = space.take<In>(size_t(A) * mid_stride);
    float* grouped = space.take<float>(size_t(A) * D);
    Mid* raw;
    if constexpr (std::is_same_v<Mid, In>)
        raw = middle;
    else
        raw = space.take<Mid>(size_t(A) * padded);
    const int raw_stride = std::is_same_v<Mid, In> ? mid_stride : padded;
    const size_t in_block = block_elements<W>(D), mid_block = block_elements<W>(F);
    const int out_blocks = ceil_div(D, kLanes);
    constexpr int kPairs = kMaxBlocks / 2;  // gate and up blocks lie side by side
    const int up_items = ceil_div(mid_blocks, kPairs), down_items = ceil_div(out_blocks, kMaxBlocks);

#pragma omp parallel
    {
        rows(T, [&](int t) { convert(normed + size_t(t) * D, D, input + size_t(t) * in_stride); });
        items(int(hit.size()) * up_items, [&](int item) {
            const int e = hit[item / up_items], first = item % up_items * kPairs;
            const int count = offsets[e + 1] - offsets[e], pairs = std::min(kPairs, mid_blocks - first);
            const W* w = static_cast<const W*>(layer.w13) + (size_t(e) * mid_blocks + first) * 2 * in_block;
            const float* scale = layer.w13_scale ? layer.w13_scale + (size_t(e) * mid_blocks + first) * 2 * kLanes : nullptr;
            auto row = [&](int r) { return input + size_t(token[offsets[e] + r]) * in_stride; };
            auto part = [&](auto width, int done) {
                constexpr int B = decltype(width)::value;
                row_tiles<B>(count, row, w + size_t(done) * 2 * in_block, in_block, D, [&](int r, auto& acc) {
#pragma GCC unroll 8
                    for (size_t i = 0; i < std::extent_v<std::remove_reference_t<decltype(acc)>>; ++i)
#pragma GCC unroll 8
                        for (int b = 0; b < B; b += 2)
                            store(raw + size_t(offsets[e] + r + int(i)) * raw_stride + (first + done + b / 2) * kLanes,
                                  silu_mul(scaled(acc[i][b], scale, 2 * done + b), scaled(acc[i][b + 1], scale, 2 * done + b + 1)));
                });
            };
            constexpr int kWide = kBlocks<W> / 2;  // pairs of a tile
            int p = 0;
            if (count == 1)
                for (; p + kPairs <= pairs; p += kPairs) part(std::integral_constant<int, kMaxBlocks>{}, p);
            for (; p + kWide <= pairs; p += kWide) part(std::integral_constant<int, kBlocks<W>>{}, p);
            for (; p < pairs; ++p) part(std::integral_constant<int, 2>{}, p);
        });
        if constexpr (!std::is_same_v<Mid, In>)
            rows(A, [&](int a) { convert(raw + size_t(a) * raw_stride, F, middle + size_t(a) * mid_stride); });
        items(int(hit.size()) * down_items, [&](int item) {
            const int e = hit[item / down_items], first = item % down_items * kMaxBlocks;
            const W* w = static_cast<const W*>(layer.w2) + (size_t(e) * out_blocks + first) * mid_block;
            const float* scale = layer.w2_scale ? layer.w2_scale + (size_t(e) * out_blocks + first) * kLanes : nullptr;
            columns<W>(offsets[e + 1] - offsets[e], [&](int r) { return middle + size_t(offsets[e] + r) * mid_stride; }, w,
                       std::min(kMaxBlocks, out_blocks - first), F, [&](int r, int b, V16 value) {
                           const int column = (first + b) * kLanes;
                           store_part(grouped + size_t(offsets[e] + r) * D + column, scaled(value, scale, b), D - column);
                       });
        });
        rows(T, [&](int t) {
            float* to = x + size_t(t) * D;
            for (int k = 0; k < K; ++k) {
                const int from = place[size_t(t) * K + k];
                if (from < 0) continue;
                const float weight = weights[size_t(t) * K + k];
                const float* row = grouped + size_t(from) * D;
                for (int i = 0; i < D; ++i) to[i] += weight * row[i];
            }
        });
    }
}

}  // namespace mixserve
