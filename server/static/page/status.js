// Whether what the page shows is live, and in plain words what is wrong when it is not.

import { byId, setAttribute, setText } from "./dom.js";

const KINDS = { silent: "dead", dead: "dead", shutting_down: "leaving" };

/** From an event: the engine's health, and whether there is routing to show. */
export function showHealth(health, model) {
  const kind = KINDS[health.status];
  connection("live", health.status === "busy" ? "busy" : "live");
  if (kind !== undefined) alert(kind, health.message ?? `The engine is ${health.status}.`);
  else if (!model.record_routing)
    alert(
      "routing-off",
      "Routing is not recorded, so there are no experts to see: start the server without --no-record-routing.",
    );
  else alert(null, "");
}

/** Of the stream of events: `error` broke it, and the next attempt is in `retryMs`; null: when a key is there. */
export function showLost(error, retryMs) {
  connection("lost", retryMs === null ? "no key" : "not connected");
  if (retryMs === null) alert("key", `${error.message} Press Key to enter one.`);
  else if (error.code === "server_overloaded") alert("loading", `${error.message} Trying again soon.`);
  else if (error.status === 0) alert("offline", `${error.message} What is shown is old. Trying again by itself.`);
  else alert(error.code === "engine_dead" ? "dead" : "error", `${error.message} Trying again by itself.`);
}

function connection(state, text) {
  setAttribute(byId("connection"), "data-state", state);
  setText(byId("connection"), text);
}

function alert(kind, text) {
  const banner = byId("alert");
  setAttribute(banner, "data-kind", kind);
  setText(banner, text);
  banner.hidden = kind === null;
}
