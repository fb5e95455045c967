// The heatmap: a row an expert, a column a layer, bars a layer below. Cells are written only where they changed.

import { byId, element, oncePerFrame, setText } from "./dom.js";
import { count } from "./format.js";
import { BARS, METRICS } from "./metrics.js";
import { NUM_LEVELS } from "./palette.js";

export class Heatmap {
  constructor() {
    this.grid = byId("heatmap");
    this.metric = byId("heatmap-metric");
    this.span = byId("heatmap-span");
    this.rows = []; // of cells, as they are seen: the experts, then the bars
    this.model = null;
    this.routing = null;
    this.whatIf = null;
    this.active = null; // [row, layer]
    this.redraw = oncePerFrame(() => this.draw());
    this.metric.addEventListener("change", this.redraw);
    this.span.addEventListener("change", this.redraw);
    this.grid.addEventListener("pointerover", (event) => this.point(event));
    this.grid.addEventListener("pointerdown", (event) => this.point(event));
    this.grid.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.activate(null));
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.grid.addEventListener("focus", () => this.active ?? (this.rows.length && this.activate([0, 0])));
    for (let level = 0; level < NUM_LEVELS; level += 1) {
      const step = byId("scale-bar").appendChild(element("i"));
      step.style.background = `var(--level-${level})`;
    }
  }

  /** New routing of `model`; null when none is recorded. */
  show(model, routing) {
    if (this.model?.num_layers !== model.num_layers || this.model?.num_experts !== model.num_experts) this.build(model);
    this.model = model;
    this.routing = routing;
    this.redraw();
  }

  /** The window of a what-if answer. */
  showWhatIf(whatIf) {
    this.whatIf = whatIf;
    if (this.metric.value === "whatif") this.redraw();
  }

  build(model) {
    const { num_layers: numLayers, num_experts: numExperts } = model;
    const layers = [...Array(numLayers).keys()];
    const every = numLayers <= 16 ? 1 : numLayers <= 40 ? 4 : 8;
    this.grid.style.gridTemplateColumns = `max-content repeat(${numLayers}, minmax(6px, 1fr))`;
    this.grid.style.setProperty("--cell-height", numExperts <= 8 ? "22px" : numExperts <= 16 ? "16px" : "10px");
    const head = element("div", { role: "row" }, element("span", { role: "columnheader", class: "name" }, "layer"));
    for (const layer of layers) {
      head.append(element("span", { role: "columnheader", class: "layer-name" }, number(layer, every)));
    }
    const lines = [head];
    this.rows = [];
    for (let expert = 0; expert < numExperts; expert += 1) {
      lines.push(this.line(layers, number(expert, numExperts <= 16 ? 1 : 4), { class: "cell", "data-expert": expert }));
    }
    for (const [bar, { name }] of Object.entries(BARS)) {
      lines.push(this.line(layers, name, { class: "bar", "data-bar": bar }));
    }
    this.grid.replaceChildren(...lines);
    this.active = null;
  }

  line(layers, name, attributes) {
    const row = this.rows.length;
    const cells = layers.map((layer) =>
      element("div", {
        role: "gridcell",
        id: `cell-${row}-${layer}`,
        "data-layer": layer,
        "data-row": row,
        ...attributes,
      }),
    );
    this.rows.push(cells);
    return element("div", { role: "row" }, element("span", { role: "rowheader", class: "name" }, name), ...cells);
  }

  get part() {
    return this.routing?.[this.span.value] ?? null;
  }

  draw() {
    const { part, model } = this;
    if (part === null) return;
    const metric = METRICS[this.metric.value];
    const extra = this.metric.value === "whatif" ? this.whatIf : null;
    const high = metric.high(part, model.num_experts, extra) || 1;
    for (let expert = 0; expert < model.num_experts; expert += 1) {
      this.rows[expert].forEach((cell, layer) => {
        const value = metric.value(part, layer, expert, extra);
        const level = Math.round(Math.min(1, value / high) * (NUM_LEVELS - 1));
        if (cell.level !== level) {
          cell.level = level;
          cell.style.backgroundColor = `var(--level-${level})`;
        }
        this.label(cell, value, `Layer ${layer}, expert ${expert}: ${metric.text(value, part, layer, extra)}`);
      });
    }
    Object.values(BARS).forEach((bar, index) => {
      const most = bar.high(part, model) || 1;
      this.rows[model.num_experts + index].forEach((cell, layer) => {
        const value = bar.value(part, layer);
        const height = Math.round(Math.min(1, value / most) * 100);
        if (cell.level !== height) {
          cell.level = height;
          cell.style.setProperty("--height", `${height}%`);
        }
        this.label(cell, value, `Layer ${layer}: ${bar.text(value, part, layer)}`);
      });
    });
    setText(byId("scale-high"), metric.show(high));
    setText(byId("scale-low"), metric.show(0));
    setText(byId("scale-note"), metric.note(part, model.num_experts, model, extra));
    this.showValues();
  }

  label(cell, value, text) {
    if (cell.value !== value) {
      cell.value = value;
      cell.dataset.value = value;
    }
    if (cell.text === text) return;
    cell.text = text;
    cell.setAttribute("aria-label", text);
  }

  point(event) {
    const cell = event.target.closest("[data-layer]");
    if (cell !== null) this.activate([Number(cell.dataset.row), Number(cell.dataset.layer)]);
  }

  key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [row, layer] = this.active ?? [0, 0];
    const last = [this.rows.length - 1, (this.rows[0]?.length ?? 1) - 1];
    let next;
    if (event.key in steps) next = [row + steps[event.key][0], layer + steps[event.key][1]];
    else if (event.key === "Home") next = [event.ctrlKey ? 0 : row, 0];
    else if (event.key === "End") next = [event.ctrlKey ? last[0] : row, last[1]];
    else return;
    event.preventDefault();
    if (this.rows.length === 0) return;
    this.activate(next.map((at, axis) => Math.max(0, Math.min(last[axis], at))));
    this.activeCell.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  get activeCell() {
    return this.active && this.rows[this.active[0]][this.active[1]];
  }

  activate(place) {
    this.activeCell?.classList.remove("active");
    this.active = place;
    const cell = this.activeCell;
    if (cell) {
      cell.classList.add("active");
      this.grid.setAttribute("aria-activedescendant", cell.id);
    } else {
      this.grid.removeAttribute("aria-activedescendant");
    }
    this.showValues();
  }

  showValues() {
    const { part } = this;
    if (part === null) return;
    const summary =
      part.tokens === 0
        ? "No traffic yet."
        : `${count(part.tokens)} tokens in ${count(part.steps)} steps. Point at a cell for its values.`;
    setText(byId("heatmap-values"), this.activeCell?.text ?? summary);
  }
}

/** A header's number; seen only where it is a multiple of `every`, so that there is room. */
function number(value, every) {
  return element("span", value % every ? { class: "unseen" } : {}, String(value));
}
