// The API key: asked for when the server wants one, kept for this tab only.

import { byId, setText } from "./dom.js";

const STORED = "mixserve-key";

export class Keys {
  constructor() {
    this.key = sessionStorage.getItem(STORED);
    this.dialog = byId("key-dialog");
    this.field = byId("key");
    this.waiting = [];
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.use(this.field.value.trim());
    });
    byId("key-cancel").addEventListener("click", () => this.dialog.close());
    byId("key-button").addEventListener("click", () => this.ask("The key is kept in this tab, until it is closed."));
  }

  /** Resolves when there is another key to try. */
  changed() {
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  /** The server refused `key`, or wants one where it is null. One that came meanwhile is not asked for again. */
  refused(key, text) {
    if (key !== this.key) return;
    byId("key-button").hidden = false;
    this.ask(text, key !== null);
  }

  ask(text, wrong = false) {
    setText(byId("key-text"), text);
    this.field.setAttribute("aria-invalid", String(wrong));
    if (!this.dialog.open) this.dialog.showModal();
    this.field.select();
  }

  use(key) {
    if (key === "") return;
    if (!/^[!-~]+$/.test(key)) return this.ask("A key has letters, digits and signs of ASCII only.", true);
    this.key = key;
    sessionStorage.setItem(STORED, key);
    this.field.value = "";
    this.dialog.close();
    for (const resolve of this.waiting.splice(0)) resolve();
  }
}
