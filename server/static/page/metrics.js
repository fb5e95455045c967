// What the heatmap can show: each metric turns routing into a value a cell, its colour's scale, and words.

import { count, decimal, percent } from "./format.js";

/** Of `part` (the window or the total of an event) and, for the last, of a what-if answer's window. */
export const METRICS = {
  share: {
    value: (part, layer, expert) => part.share[layer][expert],
    text: (value) => `${percent(value)} of the layer’s choices`,
    show: (value) => percent(value),
    high: (part, numExperts) => stretched(part.share, numExperts),
    note: (part, numExperts) => `even: ${percent(1 / numExperts)}`,
  },
  entropy: {
    value: (part, layer) => part.entropy_share[layer],
    text: (value, part, layer) =>
      `router entropy ${decimal(part.entropy[layer])} nats, ${percent(value)} of the most there can be`,
    show: (value) => percent(value, 0),
    high: () => 1,
    note: () => "one value a layer; 100 %: the router is undecided",
  },
  drops: {
    value: (part, layer, expert) => part.dropped[layer][expert],
    text: (value, part, layer) =>
      `${count(value)} choices dropped; ${percent(part.drop_share[layer])} in the whole layer`,
    show: count,
    high: (part) => Math.max(1, largest(part.dropped)),
    note: (part, numExperts, model) =>
      model.capacity_factor === null ? "this model has no capacity limit" : `capacity factor ${model.capacity_factor}`,
  },
  whatif: {
    value: (part, layer, expert, whatIf) => whatIf?.by_expert[layer]?.[expert] ?? 0,
    text: (value, part, layer, whatIf) =>
      `${count(value)} choices would be dropped, ${count(whatIf?.by_layer[layer] ?? 0)} in the layer`,
    show: count,
    high: (part, numExperts, whatIf) => Math.max(1, largest(whatIf?.by_expert ?? [])),
    note: (part, numExperts, model, whatIf) =>
      whatIf === null ? "" : `at a capacity factor of ${whatIf.capacity_factor}`,
  },
};

/** The bars below the cells: one value a layer. */
export const BARS = {
  imbalance: {
    name: "max/mean",
    value: (part, layer) => part.imbalance[layer],
    high: (part, model) => Math.max(2, Math.min(model.num_experts, Math.ceil(Math.max(...part.imbalance)))),
    text: (value) => `its busiest expert has ${decimal(value)} times the mean load`,
  },
  entropy: {
    name: "entropy",
    value: (part, layer) => part.entropy_share[layer],
    high: () => 1,
    text: (value) => `router entropy is ${percent(value)} of the most there can be`,
  },
  distinct: {
    name: "used",
    value: (part, layer) => part.distinct_experts[layer],
    high: (part, model) => model.num_experts,
    text: (value, part, layer) =>
      `a step uses ${decimal(value, 1)} experts, ${decimal(part.effective_batch[layer], 1)} tokens each`,
  },
};

/** Twice an even share, or more in half shares where an expert has more; so the scale seldom moves. */
function stretched(share, numExperts) {
  const half = 0.5 / numExperts;
  return Math.min(1, Math.max(4, Math.ceil(largest(share) / half)) * half);
}

const largest = (rows) => rows.reduce((most, row) => Math.max(most, ...row), 0);
