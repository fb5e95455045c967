// Follows the server's events: reconnects with growing pauses, and rests while nobody looks.

import { ApiError } from "./api.js";

const SILENCE_MS = 15_000;
const LONGEST_PAUSE_MS = 15_000;

/**
 * Never returns. `message` gets each event; `state` gets {live: true}, {error, retryMs} before a pause, and
 * {error, retryMs: null} while it waits for a key.
 */
export async function follow(api, path, { message, state }) {
  for (let failures = 0; ;) {
    await visible();
    try {
      for await (const event of untilHidden(api, path)) {
        failures = 0;
        state({ live: true });
        message(event);
      }
      if (document.hidden) continue;
      throw new ApiError(0, "The server ended the connection.");
    } catch (error) {
      if (error.name === "AbortError" && document.hidden) continue;
      const known = error instanceof ApiError ? error : new ApiError(0, "The server fell silent.");
      if (!(error instanceof ApiError) && error.name !== "AbortError") console.error(error);
      if (known.status === 401) {
        state({ error: known, retryMs: null });
        await api.keys.changed();
        failures = 0;
        continue;
      }
      failures += 1;
      const pause = Math.min(1000 * 2 ** (failures - 1), LONGEST_PAUSE_MS) * (0.75 + Math.random() / 2);
      state({ error: known, retryMs: pause });
      await sleep(pause);
    }
  }
}

/** Aborts when the page is hidden, and when nothing has come for too long. */
async function* untilHidden(api, path) {
  const control = new AbortController();
  const abort = () => control.abort();
  const hidden = () => document.hidden && abort();
  document.addEventListener("visibilitychange", hidden);
  let watchdog = setTimeout(abort, SILENCE_MS);
  try {
    for await (const event of api.stream(path, { signal: control.signal })) {
      clearTimeout(watchdog);
      watchdog = setTimeout(abort, SILENCE_MS);
      yield event;
    }
  } finally {
    clearTimeout(watchdog);
    document.removeEventListener("visibilitychange", hidden);
  }
}

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
  });
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
