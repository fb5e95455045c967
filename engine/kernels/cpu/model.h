// A model, its weights and one step of it, and how threads share the work of a region.
#pragma once

#include <omp.h>

#include <cstdlib>

#include "math.h"

namespace mixserve {

enum WeightType { kFloat = 0, kBf16 = 1, kInt8 = 2 };

// The dimensions of one model. Mirrors ModelShape in library.py. Heads are laid out `head_stride` apart, a multiple of 16:
// what a head has beyond its head_dim is 0, in the qkv weights, in queries and in the cache.
struct Model {
    int32_t hidden, num_heads, num_kv_heads, head_dim, head_stride, num_experts, intermediate, window, weight_type, cache_type;
    float eps;
};

// One layer's weights: norms and gate in float, the rest packed; scales only of int8.
struct Layer {
    const float *input_norm, *post_norm, *gate;
    const void *qkv, *out, *w13, *w2;
    const float *qkv_scale, *out_scale, *w13_scale, *w2_scale;
};

// One step: T tokens of B sequences, flattened (engine/batch.py).
struct Step {
    int32_t num_tokens, num_seqs, table_width, block_size;
    const int64_t* slot_mapping;   // [T]
    const int32_t* cu_seqlens;     // [B + 1]
    const int32_t* seq_lens;       // [B]
    const int32_t* block_tables;   // [B][table_width]
    const float *cos, *sin;        // [T][head_dim / 2]
};

// Memory that functions work in; grows, and is kept between calls.
class Workspace {
  public:
    template <class T>
    T* take(size_t count) {
        size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (used_ + bytes > size_) grow(used_ + bytes);
        T* result = reinterpret_cast<T*>(data_ + used_);
        used_ += bytes;
        return result;
    }
    // Room for all that a call takes, before the first `take`: growing moves nothing that is in use.
    void begin(size_t bytes) {
        used_ = 0;
        if (bytes > size_) grow(bytes);
    }
    ~Workspace() { std::free(data_); }

  private:
    void grow(size_t bytes) {
        std::free(data_);
        size_ = bytes + bytes / 4 + 4096;
        data_ = static_cast<char*>(std::aligned_alloc(64, (size_ + 63) / 64 * 64));
        if (!data_) std::abort();
    }
    char* data_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

// Elements of a row of the input type.
template <class W>
int row_stride(int k) {
    if (std::is_same_v<Input<W>, Bytes>) return bytes_stride(k);
    return std::is_same_v<W, bf16> ? ceil_div(k, 2) * 2 : k;
}

// A row into the input type, padded.
inline void convert(const float* from, int size, float* to) { std::copy(from, from + size, to); }
inline void convert(const float* from, int size, bf16* to) {
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
    for (; i < size; ++i) to[i] = to_bf16(from[i]);
    if (size % 2) to[size] = 0;
}

// Work items in turn, by whoever is free. Ends with a barrier.
template <class Work>
inline void items(int count, Work work) {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; ++i) work(i);
}

template <class Work>
inline void rows(int count, Work work) {
#pragma omp for schedule(static)
    for (int i = 0; i < count; ++i) work(i);
}

inline V16 scaled(V16 value, const float* scale, int block) {
    return scale ? mul(value, load(scale + block * kLanes)) : value;
}

// Stores the first `width` numbers.
inline void store_part(float* p, V16 value, int width) {
    if (width >= kLanes) return store(p, value);
    alignas(64) float lanes[kLanes];
    store(lanes, value);
    std::copy(lanes, lanes + width, p);
}

// y = x W^T for all columns: finish(row, first column, 16 values). To be called by all threads of a region.
template <class W, class X, class Finish>
inline void product(int num_rows, X x, const void* weights, const float* scale, int num_columns, int k, Finish finish) {
    const int blocks = ceil_div(num_columns, kLanes);
    items(ceil_div(blocks, kMaxBlocks), [&](int item) {
        const int first = item * kMaxBlocks;
        columns<W>(num_rows, x, static_cast<const W*>(weights) + first * block_elements<W>(k),
                   std::min(kMaxBlocks, blocks - first), k, [&](int row, int block, V16 value) {
                       finish(row, (first + block) * kLanes, scaled(value, scale, first + block));
                   });
    });
}

}  // namespace mixserve
