// Calls of the service. Every URL is below the folder that serves this module, so a path prefix of a proxy is kept.

export const ROOT = new URL("../../", import.meta.url);
// The service accepts calls of a session cookie that change something only with this header.
const CSRF = { "X-Counterpart-CSRF": "1" };

// Access token of an embedded page, whose browser sends no cookie of this site. It is kept in memory only.
let token = null;

export function useToken(value) {
  token = value;
}

const authorisation = () => (token ? { Authorization: `Bearer ${token}` } : {});

export const toUrl = (path) => new URL(path, ROOT);

/** A problem that the service returned (RFC 9457), or a failed connection. */
export class ApiError extends Error {
  constructor(problem) {
    super(problem.title);
    this.problem = problem;
  }
}

export const NO_CONNECTION = {
  code: "no_connection",
  title: "The service does not answer",
  found: "The connection failed.",
  expected: "a running service on this address.",
  advice: "Check that the service runs. The page tries again by itself.",
};

async function toProblem(response) {
  try {
    return { status: response.status, ...(await response.json()) };
  } catch {
    return { status: response.status, code: String(response.status), title: `The service answered ${response.status}` };
  }
}

/** Send a request and return the response. */
export async function request(path, { headers = {}, ...options } = {}) {
  let response;
  try {
    response = await fetch(toUrl(path), { credentials: "same-origin", headers: { ...CSRF, ...authorisation(), ...headers }, ...options });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(NO_CONNECTION);
  }
  if (response.ok) return response;
  const problem = await toProblem(response);
  if (response.status === 401) dispatchEvent(new CustomEvent("login-needed"));
  throw new ApiError(problem);
}

export const getJson = async (path, options) => (await request(path, options)).json();

export function sendJson(method, path, body) {
  return request(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

/** Return the bytes of a file, and report the received fraction. */
export async function getBytes(path, onProgress = () => {}, signal = undefined) {
  const response = await request(path, { signal });
  const total = Number(response.headers.get("Content-Length"));
  if (!total || response.headers.get("Content-Encoding")) return response.arrayBuffer();
  const bytes = new Uint8Array(total);
  let received = 0;
  for await (const chunk of readChunks(response)) {
    bytes.set(chunk, received);
    received += chunk.length;
    onProgress(received / total);
  }
  return bytes.buffer;
}

async function* readChunks(response) {
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** Return the address of an image in this page's memory. An `img` element cannot send a token. */
export async function getPicture(path) {
  return URL.createObjectURL(await (await request(path)).blob());
}

/** Yield the server-sent events of a job. EventSource is not used, because it cannot report a status such as 401. */
export async function* followEvents(path, signal) {
  const response = await request(path, { signal, headers: { Accept: "text/event-stream" } });
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of readChunks(response)) {
    text += decoder.decode(chunk, { stream: true });
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event) yield event;
    }
  }
}

function parseEvent(block) {
  const lines = block.split(/\r?\n/);
  const field = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim()).join("\n");
  const data = field("data");
  return data ? { type: field("event") || "message", data: JSON.parse(data) } : null;
}

/** Send a scan with upload progress, which `fetch` cannot report. Returns the job. */
export function upload(path, body, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const call = new XMLHttpRequest();
    call.open("POST", toUrl(path));
    for (const [name, value] of Object.entries(CSRF)) call.setRequestHeader(name, value);
    if (body instanceof Blob) call.setRequestHeader("Content-Type", "application/octet-stream");
    call.responseType = "json";
    call.upload.addEventListener("progress", (event) => onProgress(event.lengthComputable ? event.loaded / event.total : 0));
    call.addEventListener("load", () => {
      if (call.status >= 200 && call.status < 300) return resolve(call.response);
      if (call.status === 401) dispatchEvent(new CustomEvent("login-needed"));
      return reject(new ApiError({ status: call.status, title: `The service answered ${call.status}`, ...call.response }));
    });
    call.addEventListener("error", () => reject(new ApiError(NO_CONNECTION)));
    call.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => call.abort());
    call.send(body);
  });
}
