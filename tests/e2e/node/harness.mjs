// Runs named cases one after the other and prints one JSON line for each: its name, what went wrong (or null), and
// every response that the client read, for tests/shapes.py.
//
// MIXSERVE_URL is the server's address.

import assert from "node:assert/strict";
import OpenAI from "openai";

export const MODEL = "tiny";
export const URL_ROOT = process.env.MIXSERVE_URL;
export const MESSAGES = [{ role: "user", content: "Hi" }];

let responses = [];

// fetch, with a copy of each response's body kept as it is read. `whole` is false when the reader left before the end.
async function recordedFetch(url, init) {
  const response = await fetch(url, init);
  const record = {
    path: new URL(url).pathname,
    status: response.status,
    headers: Object.fromEntries(response.headers),
    body: "",
    whole: false,
  };
  responses.push(record);
  const decoder = new TextDecoder();
  const copy = new TransformStream({
    transform(part, controller) {
      record.body += decoder.decode(part, { stream: true });
      controller.enqueue(part);
    },
    flush() {
      record.body += decoder.decode();
      record.whole = true;
    },
  });
  return new Response(response.body.pipeThrough(copy), { status: response.status, headers: response.headers });
}

export function newClient(options = {}) {
  return new OpenAI({
    baseURL: `${URL_ROOT}/v1`,
    apiKey: "none",
    maxRetries: 0,
    timeout: 60_000,
    fetch: recordedFetch,
    ...options,
  });
}

export async function run(cases) {
  for (const [name, test] of Object.entries(cases)) {
    responses = [];
    let error = null;
    try {
      await test();
    } catch (caught) {
      error = String(caught?.stack ?? caught);
    }
    console.log(JSON.stringify({ name, error, responses }));
  }
}

// The error that `call` ends with, which is of the class `kind`.
export async function errorOf(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.equal(error.constructor.name, kind.name, String(error));
    return error;
  }
  throw new assert.AssertionError({ message: `no ${kind.name}` });
}

// `extra` fields that make the model say one of `texts` and end.
export const forced = (...texts) => ({ structured_outputs: { choice: texts } });

export async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

export async function waitFor(condition, what) {
  const deadline = Date.now() + 3000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `waited too long for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export async function metric(name, key) {
  const response = await fetch(`${URL_ROOT}/metrics`, { headers: { Authorization: `Bearer ${key ?? "none"}` } });
  const line = (await response.text()).split("\n").find((text) => text.startsWith(`mixserve_${name}{`));
  return Number(line.split(" ").at(-1));
}
