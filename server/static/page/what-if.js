// The capacity slider: what a limit would have dropped of the traffic seen.

import { byId, setAttribute, setText } from "./dom.js";
import { count, percent } from "./format.js";

const SETTLE_MS = 150;
const REFRESH_MS = 3000;

export class WhatIf {
  /** `found` gets the window's part of each answer. */
  constructor(api, found) {
    this.api = api;
    this.found = found;
    this.slider = byId("capacity");
    this.timer = null;
    this.asked = 0;
    this.tokens = null;
    this.nextRefresh = 0;
    this.slider.addEventListener("input", () => {
      this.showFactor();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.ask(), SETTLE_MS);
    });
    this.showFactor();
  }

  showFactor() {
    setText(byId("capacity-number"), Number(this.slider.value).toFixed(2));
  }

  /** Asks again now and then while there is new traffic. */
  follow(routing) {
    const { tokens } = routing.total;
    if (tokens === this.tokens || performance.now() < this.nextRefresh) return;
    this.tokens = tokens;
    this.ask();
  }

  async ask() {
    this.nextRefresh = performance.now() + REFRESH_MS;
    this.asked += 1;
    const number = this.asked;
    try {
      const answer = await this.api.get(`v1/experts/what_if?capacity_factor=${this.slider.value}`);
      if (number !== this.asked) return; // the slider has moved on
      this.show(answer);
    } catch (error) {
      if (number === this.asked) setText(byId("capacity-window"), error.message);
    }
  }

  show({ window, total }) {
    const words =
      window.assigned === 0
        ? "No traffic in the latest steps."
        : `${percent(window.overflow_share, 2)} of the choices of the latest steps would be dropped ` +
          `(${count(window.overflow)} of ${count(window.assigned)}).`;
    write(byId("capacity-window"), words, window);
    const atMost = total.exact ? "" : "at most ";
    write(
      byId("capacity-total"),
      total.assigned === 0 ? "" : `Since the start: ${atMost}${percent(total.overflow_share, 2)}.`,
      total,
    );
    this.found(window);
  }
}

function write(target, words, { overflow, overflow_share: share }) {
  setText(target, words);
  setAttribute(target, "data-overflow", overflow);
  setAttribute(target, "data-share", share);
}
