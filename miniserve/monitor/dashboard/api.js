// The server: requests with the key, and streams of server-sent events. EventSource cannot send a key, fetch can.

const ROOT = new URL("..", import.meta.url); // below a proxy's prefix, too
const KEY = "miniserve-api-key";
export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  // A header holds bytes: a key with other letters is sent as its UTF-8.
  const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${bytes(key)}` } : {}) };
  const response = await fetch(new URL(`.${path}`, ROOT), { cache: "no-store", ...options, headers });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Refused(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

export const getJson = async (path) => (await request(path)).json();

// Yields {event, data} of a response. `alive` is called whenever anything comes.
export async function* events(response, alive = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = { event: "message", data: "" };
      for (const line of block.split("\n")) {
        const [name, ...rest] = line.split(": ");
        fields[name] = rest.join(": ");
      }
      yield fields;
    }
  }
}
