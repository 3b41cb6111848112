// A conversation with the model, by the API that everybody uses. Its lane is marked.

import { events, request } from "./api.js";
import { byId, h, setText } from "./util.js";

const MOST_TOKENS = 400;

export class Chat {
  constructor(started) {
    this.started = started; // called with the conversation's id
    byId("chat-new").addEventListener("click", () => this.begin());
    byId("chat").addEventListener("submit", (event) => {
      event.preventDefault();
      this.abort ? this.abort.abort() : this.say(byId("chat-text").value.trim());
    });
    byId("chat-text").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.abort) byId("chat").requestSubmit();
    });
    this.begin();
  }

  begin() {
    this.abort?.abort();
    const random = crypto.getRandomValues(new Uint32Array(1))[0];
    this.id = `chat-${random.toString(36).padStart(7, "0").slice(-5)}`;
    this.messages = [];
    byId("chat-log").replaceChildren();
    setText(byId("chat-id"), this.id);
    this.started(this.id);
  }

  async say(text) {
    if (!text) return;
    const { id, messages } = this;
    const log = byId("chat-log");
    const answer = h("p", { class: "model" }, "…");
    byId("chat-text").value = "";
    messages.push({ role: "user", content: text });
    log.append(h("p", { class: "user" }, text), answer);
    log.scrollTop = log.scrollHeight;
    this.abort = new AbortController();
    setText(byId("chat-send"), "Stop");
    let said = "";
    try {
      const response = await request("/v1/chat/completions", {
        method: "POST",
        signal: this.abort.signal,
        headers: { "Content-Type": "application/json", "X-Conversation-ID": id },
        body: JSON.stringify({ messages, stream: true, max_completion_tokens: MOST_TOKENS }),
      });
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        said += chunk.choices[0]?.delta?.content ?? "";
        const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        setText(answer, said || "…");
        if (below) log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      const known = { AbortError: "stopped", TypeError: "the server is gone" };
      if (this.id === id) log.append(h("p", { class: "error" }, known[error.name] ?? error.message));
    }
    // What was said stays said: the next turn goes on from it, and finds its KV.
    if (said) messages.push({ role: "assistant", content: said });
    else messages.pop(), setText(answer, "(nothing)");
    if (this.id === id) {
      this.abort = null;
      setText(byId("chat-send"), "Send");
    }
  }
}
