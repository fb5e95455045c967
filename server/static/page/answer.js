// One answer on the page: its tokens in their experts' colours, and what it cost.

import { element, setAttribute, setText } from "./dom.js";
import { count, decimal, large } from "./format.js";
import { expertColour } from "./palette.js";

const NAMES = { steered: "Steered", plain: "Plain" };
const SHOW_EVERY_MS = 60; // not each token: every time, the browser lays out the whole answer
const RATE_EVERY_MS = 250;
let numAnswers = 0;

export class Answer {
  /** `kind` is steered or plain. The chat has the legend, and is told which token somebody presses. */
  constructor(kind, chat) {
    this.kind = kind;
    this.chat = chat;
    this.timer = null;
    this.tokens = []; // {text, logprob}
    this.routing = []; // parallel, as the API sends it
    this.cursor = -1;
    this.selected = -1;
    this.firstAt = this.lastAt = this.shownAt = 0;
    numAnswers += 1;
    this.id = `answer-${numAnswers}`;
    this.list = element("div", {
      class: "tokens",
      role: "listbox",
      "aria-label": "Tokens of the answer. Arrow keys move, Enter shows a token's experts.",
    });
    this.error = element("p", { class: "error" });
    this.active = element("b", {}, "–");
    this.rate = element("b", {}, "–");
    this.count = element("b", {}, "0");
    this.foot = element(
      "p",
      { class: "answer-foot" },
      element("span", {}, this.active, " active parameters a token"),
      element("span", {}, this.rate, " tokens/s"),
      element("span", {}, this.count, " tokens"),
    );
    this.root = element("article", { class: "answer", "data-answer": kind, "aria-label": `${NAMES[kind]} answer` });
    this.root.append(element("h3", { class: "answer-name" }, NAMES[kind]), this.list, this.error, this.foot);
    this.state = "waiting";
    this.recolour();
    this.list.addEventListener("click", (event) => this.click(event));
    this.list.addEventListener("keydown", (event) => this.key(event));
    // By the keyboard: a press of the mouse goes to the token under it, and must not be scrolled away from it.
    this.list.addEventListener("focus", () => this.cursor < 0 && this.list.matches(":focus-visible") && this.moveTo(0));
  }

  get state() {
    return this.root.dataset.state;
  }

  set state(value) {
    this.root.dataset.state = value;
    setAttribute(this.root, "aria-busy", value === "waiting" || value === "running");
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** More of the answer; seen a little later, or at its end. */
  add({ tokens, routing }) {
    this.routing.push(...routing);
    if (tokens.length === 0) return;
    this.lastAt = performance.now();
    if (this.tokens.length === 0) {
      this.firstAt = this.lastAt;
      this.firstTokens = tokens.length;
    }
    this.tokens.push(...tokens);
    this.timer ??= setTimeout(() => this.show(), SHOW_EVERY_MS);
  }

  /** Brings what was added onto the page. */
  show() {
    clearTimeout(this.timer);
    this.timer = null;
    const shown = this.list.children.length;
    if (shown === this.tokens.length) return;
    if (shown === 0) {
      this.state = "running";
      this.list.setAttribute("tabindex", "0");
    }
    const spans = this.tokens.slice(shown).map((token, place) => this.span(token, shown + place));
    this.chat.grow(() => this.list.append(...spans));
    if (this.lastAt - this.shownAt > RATE_EVERY_MS) this.showRate();
  }

  span({ text }, index) {
    const span = element(
      "span",
      { class: "token", role: "option", id: `${this.id}-${index}`, "data-token": index, "aria-selected": "false" },
      text,
    );
    if (text.startsWith("\n")) span.classList.add("line-end");
    if (text.trim() === "") span.setAttribute("aria-label", text === "" ? "part of a character" : "white space");
    this.colour(span);
    return span;
  }

  showRate() {
    this.shownAt = performance.now();
    setText(this.count, count(this.tokens.length));
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const after = this.tokens.length - this.firstTokens;
    if (!(seconds > 0 && after > 0)) return;
    setText(this.rate, decimal(after / seconds, 1));
    this.rate.dataset.tokensPerSecond = (after / seconds).toFixed(3);
  }

  showActive(params, ofPlain) {
    setText(this.active, large(params));
    if (ofPlain !== null && ofPlain !== params) this.active.append(` (${Math.round((100 * params) / ofPlain)} %)`);
    this.active.dataset.activeParams = params;
  }

  /** The answer is over: done, stopped, or error with its text. */
  end(state, error = "") {
    this.show();
    this.showRate();
    this.chat.grow(() => setText(this.error, error));
    this.state = state;
  }

  /** The colours of the legend's layer; where an expert is picked, only its tokens have one. */
  recolour() {
    this.list.classList.toggle("picked", this.chat.legend.picked !== null);
    for (const span of this.list.children) this.colour(span);
  }

  /** By the strongest expert in the layer; without a colour where that is not known. */
  colour(span) {
    const { layer, picked } = this.chat.legend;
    const expert = this.routing[Number(span.dataset.token)]?.experts[layer]?.[0] ?? null;
    span.classList.toggle("of-pick", expert === picked);
    if (span.dataset.expert === String(expert)) return;
    setAttribute(span, "data-expert", expert);
    span.style.setProperty("--colour", expertColour(expert));
  }

  click(event) {
    const span = event.target.closest(".token");
    if (span === null) return;
    this.moveTo(Number(span.dataset.token));
    this.chat.select(this, this.cursor);
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
    if (event.key in steps) this.moveTo(this.cursor + steps[event.key]);
    else if (event.key === "Home") this.moveTo(0);
    else if (event.key === "End") this.moveTo(this.list.children.length - 1);
    else if (event.key === "Enter" || event.key === " ") this.chat.select(this, this.cursor);
    else return;
    event.preventDefault();
  }

  moveTo(index) {
    this.list.children[this.cursor]?.classList.remove("cursor");
    this.cursor = Math.max(0, Math.min(this.list.children.length - 1, index)); // of those that are shown by now
    const span = this.list.children[this.cursor];
    span.classList.add("cursor");
    span.scrollIntoView({ block: "nearest" });
    this.list.setAttribute("aria-activedescendant", span.id);
  }

  /** Marks the token whose experts are shown; -1: none. */
  mark(index) {
    this.list.children[this.selected]?.setAttribute("aria-selected", "false");
    this.selected = index;
    this.list.children[index]?.setAttribute("aria-selected", "true");
  }
}
