// The experts of one token, layer by layer, with their weights.

import { byId, element, setAttribute, setText } from "./dom.js";
import { decimal, percent } from "./format.js";
import { expertColour } from "./palette.js";

export class Trace {
  constructor() {
    this.root = byId("trace");
    this.rows = byId("trace-rows");
    this.answer = null;
    byId("trace-close").addEventListener("click", () => this.close());
    byId("chat").addEventListener("keydown", (event) => event.key === "Escape" && this.close());
  }

  /** Shows token `index` of `answer`, with the row of `layer` marked. */
  show(answer, index, layer) {
    this.answer?.mark(-1);
    this.answer = answer;
    answer.mark(index);
    const { text, logprob } = answer.tokens[index];
    const routing = answer.routing[index];
    setText(
      byId("trace-token"),
      text === "" ? "(part of a character)" : JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"'),
    );
    const likely = logprob === null ? "" : `, probability ${percent(Math.exp(logprob))}`;
    const missing =
      routing === undefined ? " Its routing is not recorded." : " These experts computed the pass that chose it.";
    setText(byId("trace-about"), `Number ${index + 1} of the ${answer.kind} answer${likely}.${missing}`);
    this.rows.replaceChildren(
      ...(routing?.experts ?? []).map((experts, at) => row(at, experts, routing.weights[at], routing.entropy[at])),
    );
    this.chosen(layer);
    this.root.hidden = false;
    this.root.scrollIntoView({ block: "nearest" });
  }

  chosen(layer) {
    for (const line of this.rows.children) line.classList.toggle("chosen", line.dataset.layer === String(layer));
  }

  close() {
    if (this.answer === null) return;
    this.root.hidden = true;
    this.answer.mark(-1);
    this.answer.list.focus({ preventScroll: true });
    this.answer = null;
  }
}

function row(layer, experts, weights, entropy) {
  const parts = experts.map((expert, place) => {
    const label = `${expert} · ${decimal(weights[place])}`;
    const part = element(
      "span",
      { "data-expert": expert, "data-weight": weights[place], title: `expert ${expert}: ${weights[place]}` },
      label,
    );
    part.style.setProperty("--colour", expertColour(expert));
    part.style.setProperty("--weight", String(Math.max(weights[place], 0.02)));
    return part;
  });
  const cell = element("td", {}, element("div", { class: "weights" }, ...(parts.length ? parts : ["all dropped"])));
  const last = element("td", { class: "entropy", "data-entropy": entropy }, decimal(entropy));
  const line = element("tr", {}, element("th", { scope: "row" }, String(layer)), cell, last);
  setAttribute(line, "data-layer", layer);
  return line;
}
