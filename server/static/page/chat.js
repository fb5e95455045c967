// The conversation: sends messages, streams one answer or two, stops them.

import { Answer } from "./answer.js";
import { complete } from "./completion.js";
import { byId, element, setText } from "./dom.js";
import { Legend } from "./legend.js";
import { Steering } from "./steering.js";
import { Trace } from "./trace.js";

export class Chat {
  constructor(api) {
    this.api = api;
    this.model = null;
    this.turns = []; // {said, answers: {steered, plain}}
    this.running = new Set(); // AbortControllers
    this.message = byId("message");
    this.steering = new Steering();
    this.trace = new Trace();
    this.legend = new Legend(() => this.recolour());
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("ask").requestSubmit(); // which looks at the fields first
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.clear());
  }

  /** What the server says of its model. */
  show(model) {
    this.model = model;
    this.steering.show(model);
    this.legend.show(model);
    byId("send").disabled = false;
  }

  send() {
    const said = this.message.value;
    if (said.trim() === "") return;
    setText(byId("steering-error"), this.model === null ? "Not connected yet." : "");
    if (this.model === null) return;
    let steered;
    try {
      steered = this.steering.fields();
    } catch (error) {
      setText(byId("steering-error"), error.message);
      return;
    }
    const steers = Object.keys(steered).length > 0;
    const compare = byId("compare").checked;
    if (compare && !steers) setText(byId("steering-error"), "Nothing is steered: both answers are plain.");
    const kinds = compare ? ["steered", "plain"] : [steers ? "steered" : "plain"];
    const turn = this.addTurn(said, kinds);
    this.message.value = "";
    this.answer(turn, kinds, steered, byId("in-turn").checked);
  }

  addTurn(said, kinds) {
    byId("hint").hidden = true;
    const answers = Object.fromEntries(kinds.map((kind) => [kind, new Answer(kind, this)]));
    const lanes = element(
      "div",
      { class: kinds.length > 1 ? "answers two" : "answers" },
      ...kinds.map((kind) => answers[kind].root),
    );
    const root = element("div", { class: "turn" }, element("p", { class: "said" }, said), lanes);
    byId("turns").append(root);
    this.scrollToEnd();
    const turn = { said, answers };
    this.turns.push(turn);
    return turn;
  }

  /** Both answers at once, in one batch; or in turn, each with the machine to itself. */
  async answer(turn, kinds, steered, inTurn) {
    const control = new AbortController();
    this.running.add(control);
    this.showRunning();
    const sampling = this.steering.sampling();
    if (kinds.length > 1 && sampling.temperature !== 0) sampling.seed = Math.floor(Math.random() * 2 ** 31);
    const start = (kind) =>
      this.stream(turn, kind, { ...sampling, ...(kind === "steered" ? steered : {}) }, control.signal);
    if (inTurn) for (const kind of kinds) await start(kind);
    else await Promise.all(kinds.map(start));
    this.running.delete(control);
    this.showRunning();
  }

  async stream(turn, kind, fields, signal) {
    const answer = turn.answers[kind];
    const { model } = this;
    if (kind === "plain") answer.showActive(model.active_params, null);
    try {
      signal.throwIfAborted();
      for await (const part of complete(this.api, model, this.messages(turn, kind), fields, signal)) {
        answer.add(part);
        const params = part.usage?.active_params_per_token;
        if (params) answer.showActive(params, model.active_params);
      }
      answer.end("done");
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else {
        answer.end("error", error.message);
        if (error.status === 401 && this.message.value === "") this.message.value = turn.said;
      }
    }
  }

  /** The conversation before `turn` as this kind of answer had it, and what was said in it. */
  messages(turn, kind) {
    const found = [];
    for (const earlier of this.turns.slice(0, this.turns.indexOf(turn))) {
      const answer = earlier.answers[kind] ?? Object.values(earlier.answers)[0];
      if (!["done", "stopped"].includes(answer.state) || answer.text === "") continue;
      found.push({ role: "user", content: earlier.said }, { role: "assistant", content: answer.text });
    }
    return [...found, { role: "user", content: turn.said }];
  }

  stop() {
    for (const control of this.running) control.abort();
  }

  clear() {
    this.stop();
    this.trace.close();
    for (const root of byId("turns").querySelectorAll(".turn")) root.remove();
    this.turns = [];
    byId("hint").hidden = false;
    setText(byId("steering-error"), "");
    this.message.focus();
  }

  select(answer, index) {
    this.trace.show(answer, index, this.legend.layer);
  }

  recolour() {
    for (const { answers } of this.turns) for (const answer of Object.values(answers)) answer.recolour();
    this.trace.chosen(this.legend.layer);
  }

  showRunning() {
    byId("stop").disabled = this.running.size === 0;
  }

  /** Whoever reads at the end stays there; whoever has scrolled up does too. */
  grow(work) {
    const box = byId("turns");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    work();
    if (atEnd) this.scrollToEnd();
  }

  scrollToEnd() {
    byId("turns").scrollTop = byId("turns").scrollHeight;
  }
}
