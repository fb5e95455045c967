// Weights into the layout of gemm.h, and rows of them back.
#pragma once

#include "model.h"

namespace mixserve {

// Rows of [rows][k] into blocks: row r becomes column (first + r) % 16 of block base + (first + r) / 16 * step.
template <class S>
void pack(const S* from, int num_rows, int k, int first, int base, int step, int weight_type, void* packed, float* scales) {
    auto value = [&](int r, int i) {
        if constexpr (std::is_same_v<S, bf16>)
            return to_float(from[size_t(r) * k + i]);
        else
            return from[size_t(r) * k + i];
    };
#pragma omp parallel for schedule(static, kLanes)  // a block at a time: its rows share lines of memory
    for (int r = 0; r < num_rows; ++r) {
        const int lane = (first + r) % kLanes;
        const size_t block = size_t(base) + size_t(first + r) / kLanes * step;
        if (weight_type == kBf16) {
            bf16* to = static_cast<bf16*>(packed) + block * block_elements<bf16>(k);
            for (int i = 0; i < k; ++i) to[(size_t(i) / 2 * kLanes + lane) * 2 + i % 2] = to_bf16(value(r, i));
        } else if (weight_type == kFloat) {
            float* to = static_cast<float*>(packed) + block * block_elements<float>(k);
            for (int i = 0; i < k; ++i) to[size_t(i) * kLanes + lane] = value(r, i);
        } else {
            float largest = 0;
            for (int i = 0; i < k; ++i) largest = std::max(largest, std::fabs(value(r, i)));
            const float scale = largest / 127.0f;
            int8_t* to = static_cast<int8_t*>(packed) + block * block_elements<int8_t>(k);
            for (int i = 0; i < k; ++i)
                to[(size_t(i) / 4 * kLanes + lane) * 4 + i % 4] = int8_t(scale > 0 ? std::lrint(value(r, i) / scale) : 0);
            scales[block * kLanes + lane] = scale;
        }
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
