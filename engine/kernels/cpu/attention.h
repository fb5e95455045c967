// Causal attention of new queries over the paged cache, this step's keys included. All arithmetic is in float.
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
    float top = running.top;
    for (int i = 0; i < count; ++i) top = std::max(top, scores[i]);
    if (top == -std::numeric_limits<float>::infinity()) {  // nothing of this piece is seen
        std::fill(scores, scores + padded, 0.0f);
        return;
    }
    for (int i = 0; i < count; ++i) scores[i] -= top;
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    float added = 0;
    for (int i = 0; i < padded; i += kLanes) {
        exp16(scores + i);
        added += sum(load(scores + i));
    }
    if (top != running.top) {
        const float shrink = running.total == 0 ? 0.0f : std::exp(running.top - top);
        for (int d = 0; d < head_dim; d += kLanes) store(out + d, mul(load(out + d), splat(shrink)));
        running.total *= shrink;
        running.top = top;
    }
    running.total += added;
}

constexpr int kDecodePiece = 64;  // positions whose scores are made at once

constexpr int kSegment = 256;  // least positions that a decode is cut into

// One query, scaled, of each of `group` heads over positions [begin, end): out [group][head_dim] is not yet divided by the total.
template <class C>
inline void decode_piece(const Pages<C>& pages, const int32_t* table, int head, const float* query, int group,
                         int begin, int end, Running* running, float* out) {
    const int dim = pages.head_dim;
    std::fill(out, out + size_t(group) * dim, 0.0f);
    alignas(64) float scores[16][kDecodePiece];
    for (int first_of_group = 0; first_of_group < group; first_of_group += 16) {
        const int heads = std::min(16, group - first_of_group);
        const float* q = query + size_t(first_of_group) * dim;
        float* o = out + size_t(first_of_group) * dim;
        for (int start = begin; start < end; start += kDecodePiece) {
            const int count = std::min(kDecodePiece, end - start);
            const C* addresses[kDecodePiece];
            for (int j = 0; j < count; ++j) addresses[j] = pages.keys + pages.offset(table, start + j, head);
            for (int j = 0; j < count; ++j) {
                if (j + 8 < count) prefetch(addresses[j + 8]);
                for (int h = 0; h < heads; ++h) {
                    V16 total = zero();
                    for (int d = 0; d < dim; d += kLanes) total = fma(load(addresses[j] + d), load(q + h * dim + d), total);
                    scores[h][j] = sum(total);
                }
            }
            for (int h = 0; h < heads; ++h) absorb(running[first_of_group + h], scores[h], count, o + h * dim, dim);
            for (int j = 0; j < count; ++j) addresses[j] = pages.values + (addresses[j] - pages.keys);
            for (int d = 0; d < dim; d += kLanes) {
                for (int h = 0; h < heads; ++h) {
                    V16 total = load(o + h * dim + d);
                    for (int j = 0; j < count; ++j) total = fma(load(addresses[j] + d), splat(scores[h][j]), total);
                    store(o + h * dim + d, total);
                }
            }
        }
    }
}

constexpr int kTile = 64;         // positions of a tile
constexpr int kQueryTile = 32;    // queries of an item

// The room that a thread needs for prompts.
struct TileRoom {
    std::vector<float> keys, values, scores, out;
    std::vector<Running> running;

    TileRoom(int rows, int dim)
        : keys(size_t(kTile) * dim), values(size_t(kTile) * dim), scores(size_t(rows) * kTile), out(size_t(rows) * dim),
          running(rows) {}
};

// Queries [first, first + count) of a chunk, whose query i stands at position start + i: rows are (query, head of group), and
// a query sees itself and window - 1 before, with window 0 all before.
// `query(i)` is the address of the group's heads of query i, [group][head_dim], already scaled.
template <class C, class Q>
inline void prompt_piece(const Pages<C>& pages, const int32_t* table, int head, Q query, int group, int window, int start,
                         int first, int count, TileRoom& room) {
    const int dim = pages.head_dim, rows = count * group;
    std::fill(room.out.begin(), room.out.begin() + size_t(rows) * dim, 0.0f);
    std::fill(room.running.begin(), room.running.begin() + rows, Running{});
    const int last = start + first + count - 1;  // the last query's position
    const int lowest = window ? std::max(0, start + first - window + 1) : 0;
    auto row = [&](int r) { return query(first + r / group) + size_t(r % group) * dim; };
    for (int tile = lowest / kTile * kTile; tile <= last; tile += kTile) {
        const int width = std::min(kTile, last + 1 - tile);
        for (int j = 0; j < kTile; ++j) {
            float* k = room.keys.data() + size_t(j / kLanes) * dim * kLanes + j % kLanes;  // [kTile / 16][dim][16]
            float* v = room.values.data() + size_t(j) * kLanes;                            // [dim / 16][kTile][16]
            if (j < width) {
                const size_t offset = pages.offset(table, tile + j, head);
                alignas(64) float wide[kLanes];
                for (int d = 0; d < dim; d += kLanes) {
                    store(wide, load(pages.keys + offset + d));
                    for (int i = 0; i < kLanes; ++i) k[size_t(d + i) * kLanes] = wide[i];
                    store(v + size_t(d) * kTile, load(pages.values + offset + d));
                }
            } else {
                for (int d = 0; d < dim; ++d) k[size_t(d) * kLanes] = 0.0f;
                for (int d = 0; d < dim; d += kLanes) store(v + size_t(d) * kTile, zero());
            }
        }
        float* scores = room.scores.data();
        columns<float>(rows, row, room.keys.data(), ceil_div(width, kLanes), dim,
                       [&](int r, int b, V16 value) { store(scores + size_t(r) * kTile + b * kLanes, value); });
        for (int r = 0; r < rows; ++r) {
            const int position = start + first + r / group;
            const int from = window ? std::max(0, position - window + 1 - tile) : 0;
            const int seen = std::min(width, position + 1 - tile);
            float* own = scores + size_t(r) * kTile;
            for (int j = 0; j < from && j < kTile; ++j) own[j] = -std::numeric_limits<float>::infinity();
            std::fill(own + std::max(0, seen), own + kTile, -std::numeric_limits<float>::infinity());
            absorb(room.running[r], own, kTile, room.out.data() + size_t(r) * dim, dim);
        }
        columns<float>(rows, [&](int r) { return scores + size_t(r) * kTile; }, room.values.data(), dim / kLanes, kTile,
                       [&](int r, int b, V16 value) {
                           float* o = room.out.data() + size_t(r) * dim + b * kLanes;
                           store(o, add(load(o), value));
                       });
    }
}

}  // namespace mixserve
