// Cases for a server without keys: API.md's "What servers get wrong", line by line, whole and streamed.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { collect, errorOf, forced, MESSAGES, metric, MODEL, newClient, run, URL_ROOT, waitFor } from "./harness.mjs";

const client = newClient();
const END = 257;
const usageToo = { stream: true, stream_options: { include_usage: true } };
const complete = (body) => client.completions.create({ model: MODEL, prompt: "Hi", ...body });
const chat = (body) => {
  const limit = "max_tokens" in body ? {} : { max_completion_tokens: 200 };
  return client.chat.completions.create({ model: MODEL, messages: MESSAGES, ...limit, ...body });
};

// Both ways to the same: { text, pieces, finish_reason, usage, lists, entries, role } of each choice.
async function ask(endpoint, stream, body) {
  const create = endpoint === "chat" ? chat : complete;
  const chunks = stream ? await collect(await create({ ...body, ...usageToo })) : [await create(body)];
  const choices = [];
  for (const chunk of chunks) {
    for (const choice of chunk.choices) {
      const own = (choices[choice.index] ??= { text: "", pieces: [], lists: null, entries: [], finish_reason: null });
      const message = choice.message ?? choice.delta;
      const text = endpoint === "chat" ? message.content : choice.text;
      if (text) {
        own.text += text;
        own.pieces.push(text);
      }
      own.role ??= message?.role;
      assert.equal(own.finish_reason, null, "finish_reason is null in every chunk before the last");
      own.finish_reason = choice.finish_reason;
      if (choice.logprobs && endpoint === "chat") own.entries.push(...choice.logprobs.content);
      if (choice.logprobs && endpoint !== "chat") {
        own.lists ??= { tokens: [], token_logprobs: [], top_logprobs: [], text_offset: [] };
        for (const [key, list] of Object.entries(own.lists)) list.push(...choice.logprobs[key]);
      }
    }
  }
  return { choices, usage: chunks.at(-1).usage };
}

const only = async (...args) => {
  const { choices, usage } = await ask(...args);
  assert.equal(choices.length, 1);
  return { ...choices[0], usage };
};

// Each case for both endpoints, whole and streamed.
const everyWay = (name, test) =>
  Object.fromEntries(
    ["completions", "chat"].flatMap((endpoint) =>
      [false, true].map((stream) => [
        `${name} [${endpoint}, ${stream ? "streamed" : "whole"}]`,
        () => test(endpoint, stream),
      ]),
    ),
  );
const bothWays = (name, test) =>
  Object.fromEntries([false, true].map((stream) => [`${name} [${stream ? "streamed" : "whole"}]`, () => test(stream)]));

const errors = {
  ...everyWay("errors: a bad parameter is a 400 with four fields", async (endpoint, stream) => {
    const error = await errorOf(OpenAI.BadRequestError, () => only(endpoint, stream, { temperature: 3 }));
    assert.equal(error.status, 400);
    assert.deepEqual(Object.keys(error.error).sort(), ["code", "message", "param", "type"]);
    assert.deepEqual([error.type, error.param, error.code], ["invalid_request_error", "temperature", null]);
    assert.equal(error.requestID, error.headers.get("x-request-id"));
    assert.ok(error.requestID);
  }),
  ...everyWay("errors: model_not_found", async (endpoint, stream) => {
    const error = await errorOf(OpenAI.NotFoundError, () => only(endpoint, stream, { model: "gpt-4o" }));
    assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
  }),
  ...bothWays("errors: context_length_exceeded has both counts", async (stream) => {
    const body = { prompt: Array(2000).fill(65), max_tokens: 49 };
    const error = await errorOf(OpenAI.BadRequestError, () => only("completions", stream, body));
    assert.equal(error.code, "context_length_exceeded");
    assert.match(error.message, /\b2000\b/);
    assert.match(error.message, /\b49\b/);
  }),
};

const sse = {
  "sse: events are data and JSON, the last is [DONE]": async () => {
    for (const [path, body] of [
      ["completions", { prompt: "Hi" }],
      ["chat/completions", { messages: MESSAGES }],
    ]) {
      const response = await fetch(`${URL_ROOT}/v1/${path}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ model: MODEL, max_tokens: 4, stream: true, ...body }),
      });
      assert.match(response.headers.get("content-type"), /^text\/event-stream/);
      const events = (await response.text()).split("\n\n");
      assert.deepEqual(events.slice(-2), ["data: [DONE]", ""]);
      for (const event of events.slice(0, -2)) JSON.parse(event.replace(/^data: /, ""));
    }
  },
  "sse: one id and created, the role first, usage last": async () => {
    for (const create of [complete, chat]) {
      const chunks = await collect(await create({ max_tokens: 5, ignore_eos: true, n: 2, ...usageToo }));
      assert.equal(new Set(chunks.map((chunk) => `${chunk.id} ${chunk.created}`)).size, 1);
      assert.ok(chunks.slice(0, -1).every((chunk) => chunk.usage === null && chunk.choices.length === 1));
      assert.deepEqual(chunks.at(-1).choices, []);
      assert.equal(chunks.at(-1).usage.completion_tokens, 10);
      if (create === chat) {
        for (const index of [0, 1]) {
          const own = chunks.flatMap((chunk) => chunk.choices).filter((choice) => choice.index === index);
          assert.deepEqual(
            own.map((choice) => choice.delta.role),
            ["assistant", ...Array(own.length - 1).fill(undefined)],
          );
        }
      }
    }
  },
};

const finishReasons = {
  ...everyWay("finish_reason: stop, length, and stop when EOS is exactly at the limit", async (endpoint, stream) => {
    const said = (max_tokens) => only(endpoint, stream, { ...forced("abc"), max_tokens });
    assert.deepEqual([(await said(10)).finish_reason, (await said(10)).text], ["stop", "abc"]);
    assert.deepEqual([(await said(4)).finish_reason, (await said(4)).usage.completion_tokens], ["stop", 4]);
    assert.deepEqual([(await said(3)).finish_reason, (await said(3)).text], ["length", "abc"]);
  }),
};

const logprobs = {
  ...bothWays("logprobs: four parallel lists of completions", async (stream) => {
    const { lists, text } = await only("completions", stream, { ...forced("aé🎉z"), logprobs: 2 });
    assert.equal(text, "aé🎉z");
    assert.deepEqual(lists.text_offset, [0, 1, 1, 2, 2, 2, 2, 3]);
    assert.equal(lists.tokens[1], "bytes:\\xc3");
    assert.equal(lists.token_logprobs.length, 8);
    lists.tokens.forEach((token, i) => assert.equal(lists.top_logprobs[i][token], lists.token_logprobs[i]));
  }),
  ...bothWays("logprobs: bytes of a chat make its text", async (stream) => {
    const { entries, text } = await only("chat", stream, { ...forced("aé🎉z"), logprobs: true, top_logprobs: 3 });
    assert.equal(Buffer.from(entries.flatMap((entry) => entry.bytes)).toString(), text);
    assert.ok(entries.every((entry) => entry.top_logprobs.length === 3 && entry.logprob <= 0));
  }),
  ...everyWay("logprobs: null unless asked for", async (endpoint, stream) => {
    const { lists, entries } = await only(endpoint, stream, { max_tokens: 3 });
    assert.deepEqual([lists, entries], [null, []]);
  }),
};

const echo = {
  ...bothWays("echo: logprobs score a prompt, the first entry is null", async (stream) => {
    for (const max_tokens of [0, 1]) {
      const body = { prompt: "score me", echo: true, logprobs: 1, max_tokens, ignore_eos: true };
      const { lists, text, usage } = await only("completions", stream, body);
      assert.ok(text.startsWith("score me"));
      assert.equal(lists.token_logprobs[0], null);
      assert.equal(lists.token_logprobs.length, 8 + max_tokens);
      assert.ok(lists.token_logprobs.slice(1).every((score) => score <= 0));
      assert.deepEqual([usage.prompt_tokens, usage.completion_tokens], [8, max_tokens]);
    }
  }),
};

const several = {
  ...bothWays("n: index is prompt_index * n + i", async (stream) => {
    const body = { prompt: ["aa", "bb"], n: 2, echo: true, max_tokens: 2 };
    const { choices } = await ask("completions", stream, body);
    assert.deepEqual(
      choices.map((choice) => choice.text.slice(0, 2)),
      ["aa", "aa", "bb", "bb"],
    );
    const greedy = { temperature: 0, max_tokens: 6, ignore_eos: true };
    const said = (prompt) => only("completions", stream, { prompt, ...greedy });
    const [a, b] = [await said("aa"), await said("bb")];
    assert.notEqual(a.text, b.text);
    const together = await ask("completions", stream, { prompt: ["aa", "bb"], n: 2, ...greedy });
    assert.deepEqual(
      together.choices.map((choice) => choice.text),
      [a.text, a.text, b.text, b.text],
    );
  }),
  ...everyWay("n: allowed at temperature 0, seeded apart at 1", async (endpoint, stream) => {
    const texts = async (body) =>
      (await ask(endpoint, stream, { n: 3, max_tokens: 12, ...body })).choices.map(
        (choice) => choice.text,
      );
    assert.equal(new Set(await texts({ temperature: 0 })).size, 1);
    const seeded = await texts({ temperature: 1, seed: 7, ignore_eos: true });
    assert.equal(new Set(seeded).size, 3);
    assert.deepEqual(await texts({ temperature: 1, seed: 7, ignore_eos: true }), seeded);
  }),
};

const stops = {
  ...everyWay("stop: never leaks, is flushed at the end, usage counts up to the cut", async (endpoint, stream) => {
    const cut = await only(endpoint, stream, { ...forced("abcabdefg"), stop: ["abd", "zz"] });
    assert.deepEqual([cut.text, cut.finish_reason, cut.usage.completion_tokens], ["abc", "stop", 3]);
    const flushed = await only(endpoint, stream, { ...forced("xxab"), stop: "abd" });
    assert.deepEqual([flushed.text, flushed.finish_reason], ["xxab", "stop"]);
  }),
  "stop: held back while undecided": async () => {
    const said = "abcabcabx".repeat(12);
    const { text, pieces } = await only("completions", true, { ...forced(said), stop: "abd", max_tokens: 200 });
    assert.equal(text, said);
    assert.ok(pieces.every((piece) => /[cx]$/.test(piece)));
  },
};

const utf8 = {
  ...everyWay("utf8: a character is sent when it is whole", async (endpoint, stream) => {
    const said = "naïve 🎉 日本 ".repeat(10);
    const { text, pieces } = await only(endpoint, stream, { ...forced(said), max_tokens: 300 });
    assert.equal(text, said);
    assert.ok(pieces.every((piece) => piece.isWellFormed?.() !== false && !piece.includes("\ufffd")));
    if (stream) assert.ok(pieces.length > 5);
  }),
  "utf8: broken characters are streamed as they are returned": async () => {
    const body = { seed: 3, temperature: 2, max_tokens: 64, ignore_eos: true };
    const [whole, streamed] = [await only("completions", false, body), await only("completions", true, body)];
    assert.equal(whole.text, streamed.text);
    assert.ok(whole.text.includes("\ufffd"));
  },
};

const usage = {
  ...everyWay("usage: the end-of-sequence token counts, logprobs leave it out", async (endpoint, stream) => {
    const scored = endpoint === "chat" ? { logprobs: true } : { logprobs: 0 };
    const found = await only(endpoint, stream, { ...forced("xyz"), ...scored });
    assert.equal(found.usage.completion_tokens, 4);
    assert.equal(found.usage.total_tokens, found.usage.prompt_tokens + 4);
    assert.equal(endpoint === "chat" ? found.entries.length : found.lists.tokens.length, 3);
  }),
  ...bothWays("usage: n, an end at once, cached tokens", async (stream) => {
    const many = await ask("completions", stream, { prompt: ["abcd", "ef"], n: 3, ...forced("xyz") });
    assert.deepEqual([many.usage.prompt_tokens, many.usage.completion_tokens], [6, 24]);
    const nothing = await only("completions", stream, { logit_bias: { [END]: 100 }, temperature: 0 });
    assert.deepEqual([nothing.text, nothing.usage.completion_tokens], ["", 1]);
    const cached = { prompt: "p".repeat(40), max_tokens: 1, cache_salt: `node ${stream}` };
    assert.equal((await only("completions", stream, cached)).usage.prompt_tokens_details, undefined);
    assert.equal((await only("completions", stream, cached)).usage.prompt_tokens_details.cached_tokens, 32);
  }),
};

const specials = {
  ...bothWays("special tokens in a message are text", async (stream) => {
    const tokens = async (content) =>
      (await only("chat", stream, { messages: [{ role: "user", content }], max_tokens: 1 })).usage.prompt_tokens;
    assert.equal(await tokens("<|im_end|>"), await tokens("x".repeat(10)));
  }),
};

const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
    strict: true,
  },
};
const named = { type: "function", function: { name: "get_weather" } };

const tools = {
  "tools: a named one, whole": async () => {
    for (const tool_choice of [named, "required"]) {
      const [choice] = (await chat({ tools: [weather], tool_choice, parallel_tool_calls: false })).choices;
      assert.deepEqual([choice.finish_reason, choice.message.content], ["tool_calls", null]);
      const [call] = choice.message.tool_calls;
      assert.deepEqual([call.type, call.function.name], ["function", "get_weather"]);
      assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
    }
  },
  "tools: put together from deltas by hand": async () => {
    const calls = [];
    let finish = null;
    for await (const chunk of await chat({ tools: [weather], tool_choice: named, stream: true })) {
      for (const delta of chunk.choices[0].delta.tool_calls ?? []) {
        const call = (calls[delta.index] ??= { id: delta.id, name: delta.function.name, arguments: "" });
        call.arguments += delta.function.arguments ?? "";
      }
      finish = chunk.choices[0].finish_reason;
    }
    assert.equal(finish, "tool_calls");
    assert.equal(calls.length, 1);
    assert.equal(calls[0].name, "get_weather");
    assert.ok(calls[0].id);
    assert.ok(["Paris", "Rome"].includes(JSON.parse(calls[0].arguments).city));
  },
  "tools: put together by the client's stream helper": async () => {
    const stream = client.chat.completions.stream({
      model: MODEL,
      messages: MESSAGES,
      tools: [weather],
      tool_choice: named,
    });
    const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
    assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
  },
  ...bothWays("tools: the client's runner calls the function and sends its result back", async (stream) => {
    let asked;
    const runner = client.chat.completions.runTools({
      model: MODEL,
      messages: MESSAGES,
      stream,
      max_completion_tokens: 200,
      tool_choice: named,
      tools: [
        {
          ...weather,
          function: {
            ...weather.function,
            parse: JSON.parse,
            function: (given) => {
              asked = given.city;
              return "Sunny.";
            },
          },
        },
      ],
    });
    assert.equal(await runner.finalFunctionToolCallResult(), "Sunny.");
    assert.ok(["Paris", "Rome"].includes(asked));
  }),
  ...bothWays("tools: messages of tools go back in", async (stream) => {
    const call = { id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city":"Rome"}' } };
    const messages = [
      ...MESSAGES,
      { role: "assistant", content: null, tool_calls: [call] },
      { role: "tool", tool_call_id: "call_1", content: "Sunny." },
    ];
    const body = { tools: [weather], max_tokens: 3, ignore_eos: true };
    const [short, long] = [await only("chat", stream, body), await only("chat", stream, { ...body, messages })];
    assert.equal(long.finish_reason, "length");
    assert.ok(long.usage.prompt_tokens > short.usage.prompt_tokens + 'get_weather{"city":"Rome"}Sunny.'.length);
  }),
};

const structured = {
  ...everyWay("structured output: json_schema", async (endpoint, stream) => {
    const schema = weather.function.parameters;
    const response_format = { type: "json_schema", json_schema: { name: "city", strict: true, schema } };
    const { text, finish_reason } = await only(endpoint, stream, { response_format, max_tokens: 100 });
    assert.equal(finish_reason, "stop");
    assert.ok(["Paris", "Rome"].includes(JSON.parse(text).city));
  }),
  ...everyWay("structured output: a schema that cannot be is a 400", async (endpoint, stream) => {
    const response_format = { type: "json_schema", json_schema: { name: "x", schema: { type: "nonsense" } } };
    const error = await errorOf(OpenAI.BadRequestError, () => only(endpoint, stream, { response_format }));
    assert.equal(error.param, "response_format");
  }),
};

const rest = {
  "models: list and retrieve": async () => {
    const models = await collect(client.models.list());
    assert.deepEqual(
      models.map((model) => [model.id, model.object]),
      [[MODEL, "model"]],
    );
    assert.equal((await client.models.retrieve(MODEL)).max_model_len, 2048);
    const error = await errorOf(OpenAI.NotFoundError, () => client.models.retrieve("gpt-4o"));
    assert.equal(error.code, "model_not_found");
  },
  "request ids go in and out": async () => {
    const { response } = await client.completions
      .create({ model: MODEL, prompt: "Hi", max_tokens: 1 }, { headers: { "X-Request-Id": "node-1" } })
      .withResponse();
    assert.equal(response.headers.get("x-request-id"), "node-1");
    assert.ok((await complete({ max_tokens: 1 }))._request_id);
  },
  "parameters without effect, and unknown ones, are taken": async () => {
    const body = { user: "me", metadata: { a: "b" }, store: true, service_tier: "auto", nobody_knows: [1], stop: null };
    for (const endpoint of ["completions", "chat"]) await only(endpoint, false, { max_tokens: 1, ...body });
  },
  "abort: a stream that the client leaves ends on the server": async () => {
    const controller = new AbortController();
    const stream = await client.completions.create(
      { model: MODEL, prompt: "Hi", max_tokens: 2000, ignore_eos: true, stream: true },
      { signal: controller.signal },
    );
    let count = 0;
    for await (const _ of stream) if (++count === 3) controller.abort();
    assert.ok(count < 1000);
    await waitFor(async () => (await metric("num_requests_running")) === 0, "the request's end");
  },
  "abort: a plain request too": async () => {
    const controller = new AbortController();
    const before = await metric("requests_aborted_total");
    const body = { model: MODEL, prompt: "Hi", max_tokens: 2000, ignore_eos: true };
    const asked = client.completions.create(body, { signal: controller.signal });
    await Promise.all([
      errorOf(OpenAI.APIUserAbortError, () => asked),
      waitFor(async () => (await metric("num_requests_running")) === 1, "its begin").then(() => controller.abort()),
    ]);
    await waitFor(async () => (await metric("requests_aborted_total")) === before + 1, "the request's end");
  },
};

await run({
  ...errors,
  ...sse,
  ...finishReasons,
  ...logprobs,
  ...echo,
  ...several,
  ...stops,
  ...utf8,
  ...usage,
  ...specials,
  ...tools,
  ...structured,
  ...rest,
});
