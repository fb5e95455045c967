// The layers of a decoder on the CPU, as C functions, in a library for each instruction set (setup.py): in one library the
// linker would take the templates of one set for all. engine/kernels/cpu/library.py has the same structures and
// signatures in ctypes.
//
// Hidden states are float [T][D]; products read them in the weights' input type (bf16 beside bf16 weights). Every
// function is one OpenMP region; between its phases threads meet at a barrier.

#include "attention_block.h"
#include "moe_block.h"
#include "pack.h"
#include "route.h"

namespace mixserve {

template <class W>
void linear(const float* x, int T, int k, const void* weights, const float* scale, int num_columns, float* y,
            Workspace& space) {
    using In = Input<W>;
    const int stride = row_stride<W>(k);
    space.begin(sizeof(In) * size_t(T) * stride + 4096);
    In* input = space.take<In>(size_t(T) * stride);
#pragma omp parallel
    {
        rows(T, [&](int t) { convert(x + size_t(t) * k, k, input + size_t(t) * stride); });
        product<W>(T, [&](int t) { return input + size_t(t) * stride; }, weights, scale, num_columns, k,
                   [&](int t, int column, V16 value) {
                       store_part(y + size_t(t) * num_columns + column, value, num_columns - column);
                   });
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
    for (int t = 0; t < T; ++t) rms_norm(x + size_t(t) * size, weight, size, eps, y + size_t(t) * size);
}

void EXPORT(embed)(const void* packed, const float* scales, int32_t weight_type, int32_t k, const int64_t* ids, int32_t T,
                   float* y) {
#pragma omp parallel for schedule(static) if (T > 8)
    for (int t = 0; t < T; ++t) unpack_row(packed, scales, weight_type, k, ids[t], y + size_t(t) * k);
}

void EXPORT(pack)(const void* from, int32_t is_bf16, int32_t num_rows, int32_t k, int32_t first, int32_t base, int32_t step,
                  int32_t weight_type, void* packed, float* scales) {
    auto run = [&](auto* rows) {
        if (weight_type == kBf16) return pack(rows, num_rows, k, first, base, step, static_cast<bf16*>(packed), scales);
        if (weight_type == kInt8) return pack(rows, num_rows, k, first, base, step, static_cast<int8_t*>(packed), scales);
        pack(rows, num_rows, k, first, base, step, static_cast<float*>(packed), scales);
    };
    if (is_bf16) return run(static_cast<const bf16*>(from));
    run(static_cast<const float*>(from));
}

// Whether this machine has instruction set `isa`: 0 scalar, 1 AVX2, 2 AVX512, 3 AVX512 with BF16 and VNNI.
int EXPORT(supports)(int isa) {
#if defined(__x86_64__)
    if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == 2) return avx512;
    if (isa == 3) return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    return isa == 0;
}

}  // extern "C"
