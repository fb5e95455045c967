// Cases for a server with the three keys in MIXSERVE_KEYS, each of which may have one request; in all, one runs and one
// waits.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { errorOf, metric, MODEL, newClient, run, waitFor } from "./harness.mjs";

const keys = process.env.MIXSERVE_KEYS.split(" ");
const [first, second, third] = keys.map((apiKey) => newClient({ apiKey }));
const short = { model: MODEL, prompt: "Hi", max_tokens: 2 };
const long = { model: MODEL, prompt: "Hi", max_tokens: 16_000, ignore_eos: true, stream: true };
const bothWays = (name, test) =>
  Object.fromEntries([false, true].map((stream) => [`${name} [${stream ? "streamed" : "whole"}]`, () => test(stream)]));

// While a stream of the first key runs.
async function besideStream(test) {
  const stream = await first.completions.create(long);
  const events = stream[Symbol.asyncIterator]();
  await events.next();
  try {
    await test();
  } finally {
    stream.controller.abort();
    await waitFor(async () => (await metric("num_requests_running", keys[0])) === 0, "the stream's end");
  }
}

await run({
  ...bothWays("errors: invalid_api_key", async (stream) => {
    for (const apiKey of ["nonsense", `${keys[0]}x`]) {
      const stranger = newClient({ apiKey });
      const error = await errorOf(OpenAI.AuthenticationError, () =>
        stranger.completions.create({ ...short, stream }),
      );
      assert.deepEqual([error.status, error.code], [401, "invalid_api_key"]);
    }
    await second.completions.create({ ...short, stream: false });
  }),
  ...bothWays("errors: rate_limit_exceeded", (stream) =>
    besideStream(async () => {
      const error = await errorOf(OpenAI.RateLimitError, () => first.completions.create({ ...short, stream }));
      assert.deepEqual([error.status, error.code], [429, "rate_limit_exceeded"]);
      assert.ok(Number(error.headers.get("retry-after")) >= 1);
    }),
  ),
  ...bothWays("errors: server_overloaded", async (stream) => {
    let waiting;
    await besideStream(async () => {
      waiting = second.completions.create({ ...short, stream: false });
      await waitFor(async () => (await metric("num_requests_waiting", keys[0])) === 1, "the one that waits");
      const error = await errorOf(OpenAI.InternalServerError, () => third.completions.create({ ...short, stream }));
      assert.deepEqual([error.status, error.code], [503, "server_overloaded"]);
      assert.ok(Number(error.headers.get("retry-after")) >= 1);
    });
    assert.equal((await waiting).choices.length, 1);
  }),
});
