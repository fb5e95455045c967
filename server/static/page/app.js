// Puts the page together: one feed of events, and those who show parts of it.

import { Api } from "./api.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { follow } from "./feed.js";
import { showFacts, showLoad, showMemory } from "./figures.js";
import { Heatmap } from "./heatmap.js";
import { Keys } from "./keys.js";
import { defineLevels } from "./palette.js";
import { showHealth, showLost } from "./status.js";
import { switchTheme } from "./theme.js";
import { WhatIf } from "./what-if.js";

defineLevels();
const api = new Api(new Keys());
const heatmap = new Heatmap();
const whatIf = new WhatIf(api, (window) => heatmap.showWhatIf(window));
const charts = new Charts();
const chat = new Chat(api);
switchTheme(byId("theme"), () => charts.recolour());

byId("reset").addEventListener("click", async () => {
  try {
    await api.request("v1/experts/reset", { body: {} });
  } catch (error) {
    showLost(error, 0);
  }
});

function show(event) {
  const { model, routing } = event;
  showHealth(event.health, model);
  showFacts(model);
  showLoad(event);
  showMemory(event.memory);
  charts.add(event);
  chat.show(model);
  byId("experts").hidden = routing === null;
  if (routing === null) return;
  heatmap.show(model, routing);
  whatIf.follow(routing);
}

follow(api, "v1/experts/events", {
  message: show,
  state: ({ live, error, retryMs }) => live || showLost(error, retryMs),
});
