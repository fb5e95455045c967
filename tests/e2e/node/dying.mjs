// A stream whose engine is killed after its first chunk, when this has said so.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { errorOf, MODEL, newClient, run } from "./harness.mjs";

await run({
  "errors: in the midst of a stream, the last event": async () => {
    const stream = await newClient().completions.create({
      model: MODEL,
      prompt: "Hi",
      max_tokens: 16_000,
      ignore_eos: true,
      stream: true,
    });
    let count = 0;
    const error = await errorOf(OpenAI.APIError, async () => {
      for await (const _ of stream) if (++count === 1) console.log('{"event":"started"}');
    });
    assert.ok(count >= 1);
    assert.equal(error.code, "engine_dead");
    assert.equal(error.type, "server_error");
  },
});
