// One streamed answer of the API, as tokens with their routing.

/**
 * Yields {tokens, routing, usage} for each chunk: `tokens` are {text, logprob}, `routing` the API's entries. Over the
 * whole stream entry i of both is token i; the end-of-sequence token has only routing. The text of a character that is
 * split over tokens comes with its last one.
 */
export async function* complete(api, model, messages, fields, signal) {
  const body = { stream: true, stream_options: { include_usage: true }, ...fields };
  if (model.record_routing) body.routing = true;
  const path = model.chat ? "v1/chat/completions" : "v1/completions";
  if (model.chat) Object.assign(body, { messages, logprobs: true });
  else Object.assign(body, { prompt: messages.at(-1).content, logprobs: 0 });
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  for await (const chunk of api.stream(path, { body, signal })) {
    const choice = chunk.choices[0];
    const scored = model.chat ? chatTokens(choice?.logprobs) : completionTokens(choice?.logprobs);
    const tokens = scored.map(({ bytes, text, logprob }) => ({
      text: bytes === null ? decoder.decode() + text : decoder.decode(bytes, { stream: true }),
      logprob,
    }));
    yield { tokens, routing: choice?.routing?.tokens ?? [], usage: chunk.usage ?? null };
  }
  const rest = decoder.decode();
  if (rest !== "") yield { tokens: [{ text: rest, logprob: null }], routing: [], usage: null };
}

/** `bytes` is null for a control token, which is no part of the text. */
function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map(({ bytes, logprob }) => ({
    bytes: bytes && Uint8Array.from(bytes),
    text: "",
    logprob,
  }));
}

/** Completions name a token by its text or, where that is no whole text, `bytes:\xf0\x9f`. */
function completionTokens(logprobs) {
  const encoder = new TextEncoder();
  return (logprobs?.tokens ?? []).map((name, index) => {
    const split = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(name);
    const bytes =
      split === null
        ? encoder.encode(name)
        : Uint8Array.from(split[1].match(/[0-9a-f]{2}/g), (hex) => parseInt(hex, 16));
    return { bytes, text: "", logprob: logprobs.token_logprobs[index] };
  });
}
