// The controls of an answer: how many experts a token, which are forbidden, how weak one may be; and of sampling.

import { byId, element, setText } from "./dom.js";

export class Steering {
  constructor() {
    this.model = null;
    this.topK = byId("experts-per-token");
    this.minP = byId("min-p");
    this.forbidden = byId("forbidden");
    this.layers = byId("forbidden-layers");
    this.minP.addEventListener("input", () =>
      setText(byId("min-p-number"), this.minP.value === "0" ? "off" : Number(this.minP.value).toFixed(2)),
    );
    this.forbidden.addEventListener("click", (event) => {
      const chip = event.target.closest("button");
      if (chip !== null) chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    });
  }

  /** Offers what `model` can do. */
  show(model) {
    const offered = JSON.stringify([model.num_experts, model.num_experts_per_tok, model.max_experts_per_tok]);
    if (this.offered !== offered) {
      this.offered = offered;
      const options = [element("option", { value: "" }, `model’s (${model.num_experts_per_tok})`)];
      for (let k = 1; k <= model.max_experts_per_tok; k += 1) options.push(element("option", { value: k }, String(k)));
      this.topK.replaceChildren(...options);
      const chips = [...Array(model.num_experts).keys()].map((expert) =>
        element(
          "button",
          {
            type: "button",
            class: "chip",
            "data-expert": expert,
            "aria-pressed": "false",
            "aria-label": `Forbid expert ${expert}`,
          },
          String(expert),
        ),
      );
      this.forbidden.replaceChildren(...chips);
    }
    if (this.model === null) byId("max-tokens").value = Math.min(256, Math.floor(model.max_model_len / 2));
    this.model = model;
  }

  /** The fields of a request that steer; none when the controls are neutral. Throws an Error that says what to mend. */
  fields() {
    const fields = {};
    if (this.topK.value !== "") fields.experts_per_token = Number(this.topK.value);
    if (this.minP.value !== "0") fields.expert_min_p = Number(this.minP.value);
    const ids = [...this.forbidden.querySelectorAll('[aria-pressed="true"]')].map((chip) =>
      Number(chip.dataset.expert),
    );
    if (ids.length > 0) {
      if (ids.length === this.model.num_experts) throw new Error("At least one expert must stay allowed.");
      const layers = layerNumbers(this.layers.value, this.model.num_layers);
      fields.expert_mask = layers === null ? ids : Object.fromEntries(layers.map((layer) => [layer, ids]));
    }
    return fields;
  }

  /** The fields of a request that sample. Empty boxes leave the server's defaults. */
  sampling() {
    const fields = {};
    const temperature = byId("temperature").value;
    const maxTokens = byId("max-tokens").value;
    if (temperature !== "") fields.temperature = Number(temperature);
    if (maxTokens !== "") fields.max_tokens = Number(maxTokens);
    return fields;
  }
}

/** "0-2, 7" is [0, 1, 2, 7]; nothing is null, all of them. Throws an Error for anything else. */
export function layerNumbers(text, numLayers) {
  if (["", "all"].includes(text.trim())) return null;
  const found = new Set();
  for (const part of text.split(",")) {
    const match = /^\s*(\d+)\s*(?:[-–]\s*(\d+)\s*)?$/.exec(part);
    const first = Number(match?.[1] ?? NaN);
    const last = Number(match?.[2] ?? first);
    if (!(first <= last && last < numLayers))
      throw new Error(`Layers: write them as 0-2, 7; the last is ${numLayers - 1}.`);
    for (let layer = first; layer <= last; layer += 1) found.add(layer);
  }
  return [...found];
}
