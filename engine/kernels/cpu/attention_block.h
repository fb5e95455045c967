// The first half of a layer: x += attention(norm(x)), then the norm and the gate of what follows.
#pragma once

#include "attention.h"
#include "model.h"

namespace mixserve {

// What attention reads and writes: [T][(H + 2G) * N], [T][H * N], and room for the parts of decodes.
struct Rooms {
    float *qkv, *attended, *partial;
};

// Items of attention: a chunk's queries [begin, end), or a decode's positions. A decode of a long context is cut into
// segments when there are few items; its parts then lie one after another, `part` being the place of this one.
struct Item {
    int seq, head, begin, end, part;
    bool decode;
};

struct Work {
    std::vector<Item> items;
    std::vector<int> segments;  // of each sequence; 1 where nothing is cut
    int num_parts = 0, longest_chunk = 1;
};

inline Work plan_attention(const Model& m, const Step& step) {
    Work work;
    const int G = m.num_kv_heads, threads = omp_get_max_threads();
    int decodes = 0;
    for (int b = 0; b < step.num_seqs; ++b) decodes += step.cu_seqlens[b + 1] - step.cu_seqlens[b] == 1;
    for (int b = 0; b < step.num_seqs; ++b) {
        const int queries = step.cu_seqlens[b + 1] - step.cu_seqlens[b], context = step.seq_lens[b];
        if (queries > 1) {
            work.longest_chunk = std::max(work.longest_chunk, queries);
            work.segments.push_back(1);
            for (int head = 0; head < G; ++head)
                for (int first = 0; first < queries; first += kQueryTile)
                    work.items.push_back({b, head, first, std::min(queries, first + kQueryTile), -1, false});
            continue;
        }
        const int begin = m.window ? std::max(0, context - m.window) : 0, length = context - begin;
        const int segments = std::clamp(4 * threads / (decodes * G), 1, ceil_div(length, kSegment));
        work.segments.push_back(segments);
        auto cut = [&](int i) { return begin + int(int64_t(length) * i / segments); };
        for (int head = 0; head < G; ++head)
            for (int s = 0; s < segments; ++s)
                work.items.push_back({b, head, cut(s), cut(s + 1), segments > 1 ? work.num_parts++ : -1, true});
    }
    // The costliest first: queries at the end of a prompt see the most.
    auto cost = [](const Item& i) { return i.decode ? int64_t(i.end - i.begin) : int64_t(i.end - i.begin) * i.end; };
    std::stable_sort(work.items.begin(), work.items.end(), [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
    return work;
}

// Rotary positions (Su et al. 2021): the two halves of a head turn by the position's angles. Keys and values go to their
// slots; queries are scaled, so that scores need not be.
template <class C>
void rotate(const Model& m, const Step& step, int t, float* row, C* keys, C* values) {
    const int N = m.head_dim, S = m.head_stride, H = m.num_heads, G = m.num_kv_heads;
    const float *cos = step.cos + size_t(t) * (N / 2), *sin = step.sin + size_t(t) * (N / 2);
    for (int head = 0; head < H + G; ++head) {
        float *first = row + head * S, *second = first + N / 2;
        for (int i = 0; i < N / 2; ++i) {
            const float a = first[i], b = second[i];
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
        }
    }
    const float scale = 1.0f / std::sqrt(float(N));
    for (int i = 0; i < H * S; ++i) row[i] *= scale;
    C* key = keys + size_t(step.slot_mapping[t]) * G * S;
    C* value = values + size_t(step.slot_mapping[t]) * G * S;
    for (int i = 0; i < G * S; i += kLanes) {
        store(key + i, load(row + H * S + i));
        store(value + i, load(row + (H + G) * S + i));
    }
}

// All items, by all threads of a region: rooms.qkv -> rooms.attended [T][H * N].
template <class C>
void attend(const Model& m, const Step& step, const Work& work, C* keys, C* values, const Rooms& rooms) {
    const int N = m.head_dim, S = m.head_stride, H = m.num_heads, G = m.num_kv_heads;
    const int group = H / G, width = (H + 2 * G) * S;
    const Pages<C> pages{keys, values, step.block_size, G, S};
    const size_t part_size = size_t(group) * (S + 2);  // outputs, then (top, total) of each head
    auto finish = [&](int t, int head, int of_group, const float* out, const Running& running) {
        float* to = rooms.attended + size_t(t) * H * N + (head * group + of_group) * N;
        const V16 inverse = splat(1.0f / running.total);
        for (int d = 0; d < N; d += kLanes) store_part(to + d, mul(load(out + d), inverse), N - d);
    };
    {
        TileRoom<C> room(work.longest_chunk > 1 ? kQueryTile * group : 0, S);
        std::vector<float> own(size_t(group) * S);
        std::vector<Running> running(group);
        items(int(work.items.size()), [&](int i) {
            const Item& item = work.items[i];
            const int first_token = step.cu_seqlens[item.seq], queries = step.cu_seqlens[item.seq + 1] - first_token;
            const int32_t* table = step.block_tables + size_t(item.seq) * step.table_width;
            auto query = [&](int q) { return rooms.qkv + size_t(first_token + q) * width + item.head * group * S; };
            if (!item.decode) {
                const int count = item.end - item.begin;
                prompt_piece(pages, table, item.head, query, group, m.window, step.seq_lens[item.seq] - queries, item.begin,
                             count, room);
                for (int r = 0; r < count * group; ++r)
                    finish(first_token + item.begin + r / group, item.head, r % group, room.out.data() + size_t(r) * S,
                           room.running[r]);
                return;
            }
            std::fill(running.begin(), running.end(), Running{});
            float* to = item.part < 0 ? own.data() : rooms.partial + item.part * part_size;
            decode_piece(pages, table, item.head, query(0), group, item.begin, item.end, running.data(), to);
            for (int h = 0; h < group; ++h) {
                if (item.part < 0) {
                    finish(first_token, item.head, h, to + size_t(h) * S, running[h]);
                } else {
                    to[size_t(group) * S + 2 * h] = running[h].top;
                    to[size_t(group) * S + 2 * h + 1] = running[h].total;
                }
            }
        });
    }
    if (!work.num_parts) return;
#pragma omp single
    {
        std::vector<float> out(S);
        int part = 0;
        for (int b = 0; b < step.num_seqs; ++b) {
            const int segments = work.segments[b];
            for (int head = 0; head < G && segments > 1; ++head, part += segments) {
                for (int h = 0; h < group; ++h) {
                    Running all;
                    const float* first = rooms.partial + part * part_size;
                    const size_t top = size_t(group) * S + 2 * h, total = top + 1;
                    for (int s = 0; s < segments; ++s) all.top = std::max(all.top, first[s * part_size + top]);
                    std::fill(out.begin(), out.end(), 0.0f);
                    for (int s = 0; s < segments; ++s) {
                        const float* piece = first + s * part_size;
                        const float share = std::exp(piece[top] - all.top);
                        all.total += share * piece[total];
                        for (int d = 0; d < N; ++d) out[d] += share * piece[size_t(h) * S + d];
                    }
                    finish(step.cu_seqlens[b], head, h, out.data(), all);
                }
            }
        }
    }
}

template <class W>
void attention_block(const Model& m, const Layer& layer, const Step& step, float* x, void* keys, void* values,
                     float* normed, float* gate_logits, Workspace& space) {
    using In = Input<W>;
    const int T = step.num_tokens, D = m.hidden, N = m.head_dim, S = m.head_stride, H = m.num_heads, G = m.num_kv_heads;
    const int width = (H + 2 * G) * S, stride = row_stride<W>(std::max(D, H * N));
    const Work work = plan_attention(m, step);
    const size_t num_partial = work.num_parts * size_t(H / G) * (S + 2);
    space.begin(sizeof(In) * size_t(T) * stride + sizeof(float) * (size_t(T) * (width + H * N) + num_partial) + 4096);
    In* input = space.take<In>(size_t(T) * stride);
    float* qkv = space.take<float>(size_t(T) * width);
    float* attended = space.take<float>(size_t(T) * H * N);
    const Rooms rooms{qkv, attended, space.take<float>(num_partial)};
    auto row = [&](int t) { return input + size_t(t) * stride; };

#pragma omp parallel
    {
        rows(T, [&](int t) {
            float* wide = normed + size_t(t) * D;  // not in use yet
            rms_norm(x + size_t(t) * D, layer.input_norm, D, m.eps, wide);
            convert(wide, D, row(t));
        });
        product<W>(T, row, layer.qkv, layer.qkv_scale, width, D, [&](int t, int column, V16 value) {
            store_part(rooms.qkv + size_t(t) * width + column, value, width - column);
        });
        auto with_cache = [&](auto* k, auto* v) {
            rows(T, [&](int t) { rotate(m, step, t, rooms.qkv + size_t(t) * width, k, v); });
            attend(m, step, work, k, v, rooms);
        };
        if (m.cache_type == kBf16)
            with_cache(static_cast<bf16*>(keys), static_cast<bf16*>(values));
        else
            with_cache(static_cast<float*>(keys), static_cast<float*>(values));
        rows(T, [&](int t) { convert(rooms.attended + size_t(t) * H * N, H * N, row(t)); });
        product<W>(T, row, layer.out, layer.out_scale, D, H * N, [&](int t, int column, V16 value) {
            float* to = x + size_t(t) * D + column;
            if (column + kLanes <= D) return store(to, add(load(to), value));
            alignas(64) float lanes[kLanes];
            store(lanes, value);
            for (int i = 0; i < D - column; ++i) to[i] += lanes[i];
        });
        rows(T, [&](int t) {
            float* to = normed + size_t(t) * D;
            rms_norm(x + size_t(t) * D, layer.post_norm, D, m.eps, to);
            for (int e = 0; e < m.num_experts; ++e)
                gate_logits[size_t(t) * m.num_experts + e] = dot(to, layer.gate + size_t(e) * D, D);
        });
    }
}

}  // namespace mixserve
