// Which colour is which expert; a press leaves only that expert's tokens coloured. And the layer that colours them.

import { byId, element, oncePerFrame, setText } from "./dom.js";
import { defineExperts, expertColour } from "./palette.js";

export class Legend {
  /** `changed` is called when the layer or the picked expert is another one. */
  constructor(changed) {
    this.root = byId("legend");
    this.slider = byId("layer");
    this.picked = null;
    this.numExperts = 0;
    this.changed = oncePerFrame(changed);
    this.slider.addEventListener("input", () => {
      setText(byId("layer-number"), this.slider.value);
      this.changed();
    });
    this.root.addEventListener("click", (event) => {
      const chip = event.target.closest("button");
      if (chip === null) return;
      const expert = Number(chip.dataset.expert);
      this.picked = this.picked === expert ? null : expert;
      for (const each of this.root.children)
        each.setAttribute("aria-pressed", String(Number(each.dataset.expert) === this.picked));
      this.changed();
    });
  }

  get layer() {
    return Number(this.slider.value);
  }

  show(model) {
    this.slider.max = String(model.num_layers - 1);
    if (this.numExperts === model.num_experts) return;
    this.numExperts = model.num_experts;
    this.picked = null;
    defineExperts(model.num_experts);
    const chips = [...Array(model.num_experts).keys()].map((expert) => {
      const chip = element(
        "button",
        {
          type: "button",
          class: "chip",
          "data-expert": expert,
          "aria-pressed": "false",
          "aria-label": `Expert ${expert}`,
        },
        String(expert),
      );
      chip.style.setProperty("--colour", expertColour(expert));
      return chip;
    });
    this.root.replaceChildren(...chips);
  }
}
