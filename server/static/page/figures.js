// The header's facts and the tiles: load, latency, memory.

import { byId, element, setAttribute, setText } from "./dom.js";
import { bytes, count, decimal, duration, large, percent } from "./format.js";

const tiles = new Map([...document.querySelectorAll("[data-figure]")].map((tile) => [tile.dataset.figure, tile]));

function put(name, value, show) {
  const tile = tiles.get(name);
  setText(tile, show(value));
  setAttribute(tile, "data-value", value);
}

export function showFacts(model) {
  setText(byId("model"), model.id);
  document.title = `${model.id} · mixserve`;
  const facts = [
    `${model.num_layers} layers × ${model.num_experts} experts, ${model.num_experts_per_tok} a token`,
    `${large(model.active_params)} of ${large(model.total_params)} parameters active`,
    `${model.dtype} on ${model.device}`,
    `context ${count(model.max_model_len)}`,
    model.routing_simulation === null ? model.router : `forced routing: ${model.routing_simulation}`,
  ];
  const list = byId("facts");
  if (list.children.length === facts.length) facts.forEach((fact, index) => setText(list.children[index], fact));
  else list.replaceChildren(...facts.map((fact) => element("li", {}, fact)));
}

export function showLoad({ engine, throughput, latency }) {
  put("generation", throughput?.output_tokens_per_second ?? null, rate);
  put("prompt", throughput?.prompt_tokens_per_second ?? null, rate);
  put("running", engine.num_running, count);
  put("waiting", engine.num_waiting, count);
  put("kv", engine.kv_cache_usage, percent);
  put("prefix", engine.prefix_cache_hit_rate, (share) => percent(share, 0));
  setText(byId("latency-seconds"), String(latency.seconds));
  for (const [name, times] of [
    ["ttft", latency.time_to_first_token],
    ["itl", latency.inter_token],
  ]) {
    for (const rank of ["p50", "p90", "p99"]) put(`${name}_${rank}`, times?.[rank] ?? null, duration);
  }
}

const rate = (value) => (value !== null && value < 10 ? decimal(value, 1) : count(value));

const KIND_LEVELS = { expert: 22, attention: 15, embedding: 10, lm_head: 27, kv_cache: 6 };
const SPARE_LEVEL = 31;

/** A bar of the whole device's memory, or of what is used where that is unknown, and a line a kind. */
export function showMemory({ weights, total, peak, ...others }) {
  const kinds = Object.entries({ ...weights, ...others }).filter(([, size]) => size > 0);
  kinds.sort(([, left], [, right]) => right - left);
  const used = kinds.reduce((sum, [, size]) => sum + size, 0);
  setText(byId("memory-total"), `${bytes(used)}${total ? ` of ${bytes(total)}` : ""}, peak ${bytes(peak)}`);
  const names = kinds.map(([kind]) => kind).join();
  const list = byId("memory");
  if (list.dataset.kinds !== names) {
    list.dataset.kinds = names;
    byId("memory-bar").replaceChildren(...kinds.map(([kind]) => coloured(element("i"), kind)));
    list.replaceChildren(
      ...kinds.map(([kind]) =>
        element(
          "li",
          { "data-kind": kind },
          coloured(element("i", { class: "swatch" }), kind),
          element("span", { class: "kind" }, kind.replaceAll("_", " ")),
          element("span", { class: "size" }),
        ),
      ),
    );
  }
  kinds.forEach(([, size], index) => {
    setText(list.children[index].lastChild, bytes(size));
    setAttribute(list.children[index], "data-bytes", size);
    const width = `${((100 * size) / used).toFixed(2)}%`;
    const bar = byId("memory-bar").children[index];
    if (bar.style.width !== width) bar.style.width = width;
  });
}

function coloured(swatch, kind) {
  swatch.style.background = `var(--level-${KIND_LEVELS[kind] ?? SPARE_LEVEL})`;
  return swatch;
}
