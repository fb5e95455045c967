// Top-K of the softmax: engine/routing/topk_softmax.py without a capacity, in one pass over the rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace mixserve {

// What routing takes beside logits (engine/routing/base.py, RoutingInputs). Mirrors Steering in library.py.
struct Steering {
    const int64_t *slots, *top_k;  // [T], [S]
    const float* min_p;            // [S]
    const uint8_t* forbidden;      // [S][L][E]
    int32_t num_layers, max_top_k;
};

// Row t gets its K = top_k[slot] most probable experts, the first of equals, none that is forbidden or less probable
// than min_p times the best one: expert_ids and weights [T][max_top_k], -1 and 0 in unused places.
//
// Example, probabilities 0.1 0.6 0.3, K = 2: experts 1, 2 and weights 0.6, 0.3, renormalized 2/3, 1/3.
inline void route(const float* logits, int num_rows, int num_experts, int layer, bool renormalize, const Steering& steering,
                  int32_t* expert_ids, float* weights) {
    std::vector<float> score(num_experts);
    for (int t = 0; t < num_rows; ++t) {
        const float* row = logits + size_t(t) * num_experts;
        const int64_t slot = steering.slots[t];
        const uint8_t* forbidden = steering.forbidden + (size_t(slot) * steering.num_layers + layer) * num_experts;
        float top = -INFINITY, total = 0;
        for (int e = 0; e < num_experts; ++e)
            if (!forbidden[e] && row[e] > top) top = row[e];
        for (int e = 0; e < num_experts; ++e) {
            score[e] = forbidden[e] ? -1.0f : std::exp(row[e] - top);
            if (!forbidden[e]) total += score[e];
        }
        int32_t* ids = expert_ids + size_t(t) * steering.max_top_k;
        float* own = weights + size_t(t) * steering.max_top_k;
        float sum = 0, best = 0;
        for (int k = 0; k < steering.max_top_k; ++k) {
            int chosen = -1;
            for (int e = 0; e < num_experts && k < steering.top_k[slot]; ++e)
                if (score[e] >= 0 && (chosen < 0 || score[e] > score[chosen])) chosen = e;
            const float probability = chosen < 0 ? 0 : score[chosen] / total;
            if (k == 0) best = probability;
            const bool used = chosen >= 0 && probability >= steering.min_p[slot] * best;
            ids[k] = used ? chosen : -1;
            own[k] = used ? probability : 0;
            sum += own[k];
            if (chosen >= 0) score[chosen] = -1;
        }
        if (renormalize)
            for (int k = 0; k < steering.max_top_k; ++k) own[k] /= sum > 1e-30f ? sum : 1e-30f;
    }
}

}  // namespace mixserve
