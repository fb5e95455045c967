// Causal attention of new queries over the paged cache, this step's keys included. Sums are in float.
//
// A work item is one sequence and one key-value head with all query heads that share it. Decodes (one query) read the
// pages as they are, in segments when sequences are few; prompts take 64 positions at a time into tiles of packed
// "weights" and are two matrix products a tile (Dao et al. 2022, FlashAttention, algorithm 1: the softmax is kept
// as a running maximum and sum).
#pragma once

#include <vector>

#include "math.h"

namespace mixserve {

// One layer's cache, [num_blocks][block_size][num_kv_heads][head_dim] each, and where sequences have their pages.
template <class C>
struct Pages {
    C *keys, *values;
    int block_size, num_kv_heads, head_dim;

    size_t offset(const int32_t* table, int position, int head) const {
        size_t slot = size_t(table[position / block_size]) * block_size + position % block_size;
        return (slot * num_kv_heads + head) * head_dim;
    }
};

// The softmax of scores that come piece by piece: sum of e^(s - top) * v, for the scores seen so far.
struct Running {
    float top = -std::numeric_limits<float>::infinity();
    float total = 0;
};

// Rescales `out` to the new maximum, turns `scores` into e^(score - top), pads them with 0 to a multiple of 16, and adds
// them to the total.
inline void absorb(Running& running, float* scores, int count, float* out, int head_dim) {
    const int padded = ceil_div(count, kLanes) * kLanes;
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    V16 most = load(scores);
    for (int i = kLanes; i < padded; i += kLanes) most = max(most, load(scores + i));
    const float top = std::max(largest(most), running.top);  // a NaN stays one
    if (top == -std::numeric_limits<float>::infinity()) {  // nothing of this piece is seen
        std::fill(scores, scores + padded, 0.0f);
        return;
    }
    V16 added = zero();
    for (int i = 0; i < padded; i += kLanes) {
        const V16 weight = exp(sub(load(scores + i), splat(top)));
        store(scores + i, weight);
        added = add(added, weight);
    }
    if (top != running.top) {
        const float shrink = running.total == 0 ? 0.0f : std::exp(running.top - top);
        for (int d = 0; d < head_dim; d += kLanes) store(out + d, mul(load(out + d), splat(shrink)));
        running.total *= shrink;
        running.top = top;
    }
    running.total += sum(added);
}

constexpr int kDecodePiece = 64;  // positions whose scores are made at once
constexpr int kSegment = 256;     // least positions that a decode is cut into

// products[h][j] += query h * key j, still a vector, over D vectors of their dimensions from `first` on.
template <int H, int D, class C>
inline void multiply_keys(const C* const* keys, int count, const float* query, int dim, int first, float (*products)[kLanes * kLanes]) {
    V16 q[H][D];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) q[h][d] = load(query + h * dim + first + d * kLanes);
    for (int j = 0; j < count; ++j) {
        V16 key[D];
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) key[d] = load(keys[j] + first + d * kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            V16 total = first ? load(products[h] + j * kLanes) : zero();
#pragma GCC unroll 4
            for (int d = 0; d < D; ++d) total = fma(key[d], q[h][d], total);
            store(products[h] + j * kLanes, total);
        }
    }
}

// scores[h][at + j] = query h * key j, for H queries and up to 16 keys. A sum over the lanes of one vector costs more
// than its products, so that 16 are added up together.
template <int H, class C>
inline void score_keys(const C* const* keys, int count, const float* query, int dim, int at, float (*scores)[kDecodePiece]) {
    alignas(64) float products[H][kLanes * kLanes];
    int first = 0;
    for (; first + kMaxVectors * kLanes <= dim; first += kMaxVectors * kLanes)
        multiply_keys<H, kMaxVectors>(keys, count, query, dim, first, products);
    for (; first < dim; first += kLanes) multiply_keys<H, 1>(keys, count, query, dim, first, products);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        std::fill(products[h] + count * kLanes, products[h] + kLanes * kLanes, 0.0f);
        store(scores[h] + at, sum_rows(products[h]));
    }
}

// out[h] += sum over j of scores[h][j] * value j, for H heads and D vectors of their dimensions.
template <int H, int D, class C>
inline void add_values(const C* const* values, int count, const float (*scores)[kDecodePiece], int dim, int first, float* out) {
    V16 total[H][D];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) total[h][d] = load(out + h * dim + first + d * kLanes);
    for (int j = 0; j < count; ++j) {
        V16 value[D];
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) value[d] = load(values[j] + first + d * kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
            for (int d = 0; d < D; ++d) total[h][d] = fma(value[d], splat(scores[h][j]), total[h][d]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) store(out + h * dim + first + d * kLanes, total[h][d]);
}

// One query, scaled, of each of H heads over positions [begin, end): out [H][head_dim], of zeros, is not yet divided by
// the total.
template <int H, class C>
inline void decode_heads(const Pages<C>& pages, const int32_t* table, int head, const float* query, int begin, int end,
                         Running* running, float* out) {
    const int dim = pages.head_dim;
    const size_t bytes = size_t(dim) * sizeof(C);
    alignas(64) float scores[H][kDecodePiece];
    for (int start = begin; start < end; start += kDecodePiece) {
        const int count = std::min(kDecodePiece, end - start);
        const C *keys[kDecodePiece], *values[kDecodePiece];
        for (int j = 0, page = start / pages.block_size, slot = start % pages.block_size; j < count; ++j, ++slot) {
            if (slot == pages.block_size) ++page, slot = 0;
            const size_t offset = ((size_t(table[page]) * pages.block_size + slot) * pages.num_kv_heads + head) * dim;
            keys[j] = pages.keys + offset;
            values[j] = pages.values + offset;
            for (size_t i = 0; i < bytes; i += 64) prefetch(reinterpret_cast<const char*>(keys[j]) + i);
        }
        for (int first = 0; first < count; first += kLanes) {
            const int width = std::min(kLanes, count - first);
            for (int j = first; j < first + width; ++j)  // the values are asked for while the keys are multiplied
                for (size_t i = 0; i < bytes; i += 64) prefetch(reinterpret_cast<const char*>(values[j]) + i);
            score_keys<H>(keys + first, width, query, dim, first, scores);
        }
        for (int h = 0; h < H; ++h) absorb(running[h], scores[h], count, out + h * dim, dim);
        int d = 0;
        for (; d + kMaxVectors * kLanes <= dim; d += kMaxVectors * kLanes)
            add_values<H, kMaxVectors>(values, count, scores, dim, d, out);
        for (; d < dim; d += kLanes) add_values<H, 1>(values, count, scores, dim, d, out);
    }
}

// The same for `group` heads.
template <class C>
inline void decode_piece(const Pages<C>& pages, const int32_t* table, int head, const float* query, int group,
                         int begin, int end, Running* running, float* out) {
    const int dim = pages.head_dim;
    std::fill(out, out + size_t(group) * dim, 0.0f);
    for (int first = 0; first < group; first += kMaxHeads)
        with_constant<kMaxHeads>(std::min(kMaxHeads, group - first), [&](auto count) {
            decode_heads<decltype(count)::value>(pages, table, head, query + size_t(first) * dim, begin, end, running + first,
                                                 out + size_t(first) * dim);
        });
}

constexpr int kTile = 64;         // positions of a tile
constexpr int kQueryTile = 32;    // queries of an item

// The room that a thread needs for prompts. Products of a bfloat16 cache are bfloat16 products, as of weights (gemm.h).
template <class C>
struct TileRoom {
    std::vector<C> keys, values, queries, weights;
    std::vector<float> scores, out;
    std::vector<Running> running;

    TileRoom(int rows, int dim)
        : keys(size_t(kTile) * dim), values(size_t(kTile) * dim), queries(size_t(rows) * dim), weights(size_t(rows) * kTile),
          scores(size_t(rows) * kTile), out(size_t(rows) * dim), running(rows) {}
};

// Where element (column, i) of packed blocks of `size` rows lies: see gemm.h.
template <class C>
inline size_t packed_place(int column, int i, int size) {
    constexpr int kGroup = std::is_same_v<C, bf16> ? 2 : 1;
    return (size_t(column) / kLanes * (size / kGroup) + i / kGroup) * kLanes * kGroup + column % kLanes * kGroup + i % kGroup;
}

// Keys [kTile] as columns of dim rows, values as dim columns of kTile rows; zeros from `width` on.
inline void pack_tile(const float* const* keys, const float* const* values, int width, int dim, TileRoom<float>& room) {
    for (int j = 0; j < kTile; ++j) {
        float* k = room.keys.data() + packed_place<float>(j, 0, dim);
        float* v = room.values.data() + size_t(j) * kLanes;
        for (int d = 0; d < dim; ++d) k[size_t(d) * kLanes] = j < width ? keys[j][d] : 0.0f;
        for (int d = 0; d < dim; d += kLanes) store(v + size_t(d) * kTile, j < width ? load(values[j] + d) : zero());
    }
}
inline void pack_tile(const bf16* const* keys, const bf16* const* values, int width, int dim, TileRoom<bf16>& room) {
    for (int j = 0; j < kTile; ++j) {
        bf16* k = room.keys.data() + packed_place<bf16>(j, 0, dim);
        for (int d = 0; d < dim; d += 2) {  // two neighbours at a time
            uint32_t pair = 0;
            if (j < width) std::memcpy(&pair, keys[j] + d, 4);
            std::memcpy(k + size_t(d) * kLanes, &pair, 4);
        }
    }
    for (int j = 0; j < kTile; j += 2)
        for (int d = 0; d < dim; d += kLanes) {
            bf16* v = room.values.data() + packed_place<bf16>(d, j, kTile);
            for (int i = 0; i < kLanes; ++i) {
                v[2 * i] = j < width ? values[j][d + i] : bf16(0);
                v[2 * i + 1] = j + 1 < width ? values[j + 1][d + i] : bf16(0);
            }
        }
}

inline void narrow(const float* from, int size, float* to) { std::copy(from, from + size, to); }
inline void narrow(const float* from, int size, bf16* to) {
    for (int i = 0; i < size; i += kLanes) store(to + i, load(from + i));
}

// Queries [first, first + count) of a chunk, whose query i stands at position start + i: rows are (query, head of group), and
// a query sees itself and window - 1 before, with window 0 all before.
// `query(i)` is the address of the group's heads of query i, [group][head_dim], already scaled.
template <class C, class Q>
inline void prompt_piece(const Pages<C>& pages, const int32_t* table, int head, Q query, int group, int window, int start,
                         int first, int count, TileRoom<C>& room) {
    const int dim = pages.head_dim, rows = count * group;
    std::fill(room.out.begin(), room.out.begin() + size_t(rows) * dim, 0.0f);
    std::fill(room.running.begin(), room.running.begin() + rows, Running{});
    for (int i = 0; i < count; ++i) narrow(query(first + i), group * dim, room.queries.data() + size_t(i) * group * dim);
    const int last = start + first + count - 1;  // the last query's position
    const int lowest = window ? std::max(0, start + first - window + 1) : 0;
    for (int tile = lowest / kTile * kTile; tile <= last; tile += kTile) {
        const int width = std::min(kTile, last + 1 - tile);
        const C *keys[kTile], *values[kTile];
        for (int j = 0; j < width; ++j) {
            const size_t offset = pages.offset(table, tile + j, head);
            keys[j] = pages.keys + offset;
            values[j] = pages.values + offset;
        }
        pack_tile(keys, values, width, dim, room);
        float* scores = room.scores.data();
        columns<C>(rows, [&](int r) { return room.queries.data() + size_t(r) * dim; }, room.keys.data(),
                   ceil_div(width, kLanes), dim,
                   [&](int r, int b, V16 value) { store(scores + size_t(r) * kTile + b * kLanes, value); });
        for (int r = 0; r < rows; ++r) {
            const int position = start + first + r / group;
            const int from = window ? std::max(0, position - window + 1 - tile) : 0;
            const int seen = std::min(width, position + 1 - tile);
            float* own = scores + size_t(r) * kTile;
            for (int j = 0; j < from && j < kTile; ++j) own[j] = -std::numeric_limits<float>::infinity();
            std::fill(own + std::max(0, seen), own + kTile, -std::numeric_limits<float>::infinity());
            absorb(room.running[r], own, kTile, room.out.data() + size_t(r) * dim, dim);
            narrow(own, kTile, room.weights.data() + size_t(r) * kTile);
        }
        columns<C>(rows, [&](int r) { return room.weights.data() + size_t(r) * kTile; }, room.values.data(), dim / kLanes,
                   kTile, [&](int r, int b, V16 value) {
                       float* o = room.out.data() + size_t(r) * dim + b * kLanes;
                       store(o, add(load(o), value));
                   });
    }
}

}  // namespace mixserve
