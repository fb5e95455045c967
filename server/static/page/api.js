// Requests to the server that this page came from, with the key; errors as the server words them.

export class ApiError extends Error {
  /** `status` is 0 when there was no answer at all. */
  constructor(status, message, code = null, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export class Api {
  /** `keys` has the key, and is told when the server wants one or another one. */
  constructor(keys) {
    this.keys = keys;
  }

  /** The answer's JSON. */
  async get(path) {
    return (await this.request(path)).json();
  }

  /** The JSON of each event of a stream; a body makes it a POST. Throws ApiError, also for an error event. */
  async *stream(path, { body = null, signal = null } = {}) {
    const response = await this.request(path, { body, signal });
    for await (const data of sseData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error.message, event.error.code);
      yield event;
    }
    throw new ApiError(0, "The server ended the connection.");
  }

  async request(path, { body = null, signal = null } = {}) {
    const key = this.keys.key;
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    if (body !== null) headers["Content-Type"] = "application/json";
    let response;
    try {
      const method = body === null ? "GET" : "POST";
      response = await fetch(path, {
        method,
        headers,
        body: body === null ? null : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached.");
    }
    if (response.ok) return response;
    const error = await apiError(response);
    if (error.status === 401) {
      error.message = key === null ? "This server wants an API key." : "The API key is wrong.";
      this.keys.refused(key, error.message);
    }
    throw error;
  }
}

async function apiError(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy's own page, say.
  }
  return new ApiError(
    response.status,
    error.message ?? `The server answers ${response.status}.`,
    error.code ?? null,
    retryAfter,
  );
}

/** The data of each server-sent event. A stream that breaks off throws ApiError. */
async function* sseData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection broke.");
      }
      if (part.done) return;
      const lines = (pending + part.value).split("\n");
      pending = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
