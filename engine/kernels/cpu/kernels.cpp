// The layers of a decoder on the CPU, as C functions, in a library for each instruction set (setup.py): in one library the
// linker would take the templates of one set for all. engine/kernels/cpu/library.py has the same structures and
// signatures in ctypes.
//
// Hidden states are float [T][D]; products read them in the weights' input type (bf16 beside bf16 weights). Every
// function is one OpenMP region; between its phases threads meet at a barrier.

#include <omp.h>

#include <cstdlib>
#include <numeric>

#include "attention.h"
#include "route.h"

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

// Rows of the input type, so long that a pair never runs over: bf16 rows have even length.
template <class W>
int row_stride(int k) {
    return std::is_same_v<W, bf16> ? ceil_div(k, 2) * 2 : k;
}

inline void convert(const float* from, int size, float* to) { std::copy(from, from + size, to); }
inline void convert(const float* from, int size, bf16* to) {
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
    for (; i < size; ++i) to[i] = to_bf16(from[i]);
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
        TileRoom room(work.longest_chunk > 1 ? kQueryTile * group : 0, S);
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
            rms_norm<In>(x + size_t(t) * D, layer.input_norm, D, m.eps, row(t), nullptr);
            if (D % 2 && stride > D) row(t)[D] = In(0);
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
        rows(T, [&](int t) {
            convert(rooms.attended + size_t(t) * H * N, H * N, row(t));
            if (H * N % 2 && stride > H * N) row(t)[H * N] = In(0);
        });
        product<W>(T, row, layer.out, layer.out_scale, D, H * N, [&](int t, int column, V16 value) {
            float* to = x + size_t(t) * D + column;
            if (column + kLanes <= D) return store(to, add(load(to), value));
            alignas(64) float lanes[kLanes];
            store(lanes, value);
            for (int i = 0; i < D - column; ++i) to[i] += lanes[i];
        });
        rows(T, [&](int t) {
            float* to = normed + size_t(t) * D;
            rms_norm<float>(x + size_t(t) * D, layer.post_norm, D, m.eps, nullptr, to);
            for (int e = 0; e < m.num_experts; ++e)
                gate_logits[size_t(t) * m.num_experts + e] = dot(to, layer.gate + size_t(e) * D, D);
        });
    }
}

// x += sum over k of weight * W2 (silu(W1 row) * W3 row), for the chosen experts of each row; -1 is none.
//
// Assignments are grouped by expert, in the order of engine/routing/plan.py, and added up in the order of the choices.
template <class W>
void moe_block(const Model& m, const Layer& layer, int T, int K, const float* normed, const int32_t* expert_ids,
               const float* weights, float* x, Workspace& space) {
    using In = Input<W>;
    const int D = m.hidden, F = m.intermediate, E = m.num_experts;
    const int in_stride = row_stride<W>(D), mid_blocks = ceil_div(F, kLanes), mid_stride = mid_blocks * kLanes;
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

    space.begin(sizeof(In) * (size_t(T) * in_stride + size_t(A) * mid_stride) + sizeof(float) * size_t(A) * D + 4096);
    In* input = space.take<In>(size_t(T) * in_stride);
    In* middle = space.take<In>(size_t(A) * mid_stride);
    float* grouped = space.take<float>(size_t(A) * D);
    const size_t in_block = block_elements<W>(D), mid_block = block_elements<W>(F);
    const int out_blocks = ceil_div(D, kLanes);
    constexpr int kPairs = kMaxBlocks / 2;  // gate and up blocks lie side by side
    const int up_items = ceil_div(mid_blocks, kPairs), down_items = ceil_div(out_blocks, kMaxBlocks);

#pragma omp parallel
    {
        rows(T, [&](int t) {
            In* row = input + size_t(t) * in_stride;
            convert(normed + size_t(t) * D, D, row);
            if (in_stride > D) row[D] = In(0);
        });
        items(int(hit.size()) * up_items, [&](int item) {
            const int e = hit[item / up_items], first = item % up_items * kPairs;
            const int count = offsets[e + 1] - offsets[e], pairs = std::min(kPairs, mid_blocks - first);
            const W* w = static_cast<const W*>(layer.w13) + (size_t(e) * mid_blocks + first) * 2 * in_block;
            const float* scale = layer.w13_scale ? layer.w13_scale + (size_t(e) * mid_blocks + first) * 2 * kLanes : nullptr;
            auto row = [&](int r) { return input + size_t(token[offsets[e] + r]) * in_stride; };
            auto part = [&](auto width, int done) {
                constexpr int B = decltype(width)::value;
                row_tiles<B>(count, row, w + size_t(done) * 2 * in_block, in_block, D, [&](int r, auto& acc) {
                    for (size_t i = 0; i < std::extent_v<std::remove_reference_t<decltype(acc)>>; ++i)
                        for (int b = 0; b < B; b += 2)
                            store(middle + size_t(offsets[e] + r + int(i)) * mid_stride + (first + done + b / 2) * kLanes,
                                  silu_mul(scaled(acc[i][b], scale, 2 * done + b), scaled(acc[i][b + 1], scale, 2 * done + b + 1)));
                });
            };
            if (pairs == kPairs) return part(std::integral_constant<int, kMaxBlocks>{}, 0);
            for (int p = 0; p < pairs; ++p) part(std::integral_constant<int, 2>{}, p);
        });
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

template <class W>
void linear(const float* x, int T, int k, const void* weights, const float* scale, int num_columns, float* y,
            Workspace& space) {
    using In = Input<W>;
    const int stride = row_stride<W>(k);
    space.begin(sizeof(In) * size_t(T) * stride + 4096);
    In* input = space.take<In>(size_t(T) * stride);
#pragma omp parallel
    {
        rows(T, [&](int t) {
            In* row = input + size_t(t) * stride;
            convert(x + size_t(t) * k, k, row);
            if (stride > k) row[k] = In(0);
        });
        product<W>(T, [&](int t) { return input + size_t(t) * stride; }, weights, scale, num_columns, k,
                   [&](int t, int column, V16 value) {
                       store_part(y + size_t(t) * num_columns + column, value, num_columns - column);
                   });
    }
}

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
                to[size_t(i) * kLanes + lane] = int8_t(scale > 0 ? std::lrint(value(r, i) / scale) : 0);
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
            y[i] = static_cast<const int8_t*>(packed)[block * block_elements<int8_t>(k) + size_t(i) * kLanes + lane] * scales[n];
    }
}

}  // namespace mixserve

#define EXPORT(name) mixserve_##name

using namespace mixserve;

extern "C" {

Workspace* EXPORT(new_workspace)() { return new Workspace; }

void EXPORT(free_workspace)(Workspace* space) { delete space; }

void EXPORT(attention_block)(const Model* m, const Layer* layer, const Step* step, float* x, void* keys, void* values,
                             float* normed, float* gate_logits, Workspace* space) {
    auto run = [&](auto weight) {
        attention_block<decltype(weight)>(*m, *layer, *step, x, keys, values, normed, gate_logits, *space);
    };
    if (m->weight_type == kBf16) return run(bf16{});
    if (m->weight_type == kInt8) return run(int8_t{});
    run(float{});
}

void EXPORT(route)(const float* logits, int32_t T, int32_t num_experts, int32_t layer, int32_t renormalize,
                   const Steering* steering, int32_t* expert_ids, float* weights) {
    route(logits, T, num_experts, layer, renormalize, *steering, expert_ids, weights);
}

void EXPORT(moe_block)(const Model* m, const Layer* layer, int32_t T, int32_t K, const float* normed,
                       const int32_t* expert_ids, const float* weights, float* x, Workspace* space) {
    if (m->weight_type == kBf16) return moe_block<bf16>(*m, *layer, T, K, normed, expert_ids, weights, x, *space);
    if (m->weight_type == kInt8) return moe_block<int8_t>(*m, *layer, T, K, normed, expert_ids, weights, x, *space);
    moe_block<float>(*m, *layer, T, K, normed, expert_ids, weights, x, *space);
}

void EXPORT(linear)(const float* x, int32_t T, int32_t k, const void* weights, const float* scale, int32_t weight_type,
                    int32_t num_columns, float* y, Workspace* space) {
    if (weight_type == kBf16) return linear<bf16>(x, T, k, weights, scale, num_columns, y, *space);
    if (weight_type == kInt8) return linear<int8_t>(x, T, k, weights, scale, num_columns, y, *space);
    linear<float>(x, T, k, weights, scale, num_columns, y, *space);
}

void EXPORT(rms_norm)(const float* x, const float* weight, int32_t T, int32_t size, float eps, float* y) {
#pragma omp parallel for schedule(static) if (T > 8)
    for (int t = 0; t < T; ++t) rms_norm<float>(x + size_t(t) * size, weight, size, eps, nullptr, y + size_t(t) * size);
}

void EXPORT(embed)(const void* packed, const float* scales, int32_t weight_type, int32_t k, const int64_t* ids, int32_t T,
                   float* y) {
#pragma omp parallel for schedule(static) if (T > 8)
    for (int t = 0; t < T; ++t) unpack_row(packed, scales, weight_type, k, ids[t], y + size_t(t) * k);
}

void EXPORT(pack)(const void* from, int32_t is_bf16, int32_t num_rows, int32_t k, int32_t first, int32_t base, int32_t step,
                  int32_t weight_type, void* packed, float* scales) {
    if (is_bf16)
        pack(static_cast<const bf16*>(from), num_rows, k, first, base, step, weight_type, packed, scales);
    else
        pack(static_cast<const float*>(from), num_rows, k, first, base, step, weight_type, packed, scales);
}

// Whether this machine has instruction set `isa`: 0 scalar, 1 AVX2, 2 AVX512, 3 AVX512 with BF16.
int EXPORT(supports)(int isa) {
#if defined(__x86_64__)
    if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == 2) return avx512;
    if (isa == 3) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == 0;
}

}  // extern "C"
