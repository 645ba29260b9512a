// A chat over /v1/chat/completions, streamed. Leaving it, or "Stop", ends the request on the server.

const MIN_MS = 250; // between the first token and the last, for a rate that says something

class Chat {
  constructor() {
    this.history = []; // of OpenAI's messages
    this.running = null; // AbortController
    this.box = byId("messages");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) this.send();
    });
    byId("new-chat").addEventListener("click", () => {
      this.running?.abort();
      this.history = [];
      this.box.replaceChildren();
      setText(byId("chat-told"), "");
      byId("prompt").focus();
    });
  }

  add(role, text) {
    const message = make("div", "message");
    message.dataset.role = role;
    message.append(make("h3", "", role === "user" ? "You" : "Model"));
    const words = message.appendChild(make("p")).appendChild(document.createTextNode(text));
    this.box.append(message);
    this.box.scrollTop = this.box.scrollHeight;
    return { message, words };
  }

  async send() {
    const prompt = byId("prompt").value.trim();
    if (!prompt) return;
    const history = this.history;
    const body = {
      messages: [...history, { role: "user", content: prompt }],
      stream: true,
      stream_options: { include_usage: true },
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("max-tokens").value),
    };
    byId("prompt").value = "";
    this.add("user", prompt);
    const answer = this.add("assistant", "");
    this.running = new AbortController();
    setText(byId("send"), "Stop");
    setText(byId("chat-told"), "Waiting for the first token");
    const found = { begun: performance.now(), first: null, last: null, usage: null, reason: null };
    try {
      await this.stream(body, this.running.signal, found, answer);
    } catch (error) {
      if (error.name === "AbortError") found.reason = "stopped";
      else {
        found.reason = "failed";
        answer.message.classList.add("failed");
        answer.words.appendData(`${answer.words.length ? "\n" : ""}${error instanceof Refused ? error.message : "The connection was lost."}`);
      }
    }
    // A question without an answer is not said again.
    if (found.reason !== "failed" && history === this.history) {
      history.push({ role: "user", content: prompt }, { role: "assistant", content: answer.words.data });
    }
    answer.message.append(make("p", "note", summary(found)));
    this.box.scrollTop = this.box.scrollHeight;
    this.running = null;
    setText(byId("send"), "Send");
    setText(byId("chat-told"), "");
  }

  async stream(body, signal, found, answer) {
    const response = await ask("v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The answer was cut short.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const text = event.replace(/^data: /, "");
        if (text === "[DONE]") return;
        this.take(JSON.parse(text), found, answer);
      }
    }
  }

  take(chunk, found, answer) {
    if (chunk.error) throw new Refused(0, String(chunk.error.message));
    found.usage = chunk.usage ?? found.usage;
    const choice = chunk.choices[0];
    if (choice === undefined) return;
    found.reason = choice.finish_reason ?? found.reason;
    if (!choice.delta.content) return;
    found.last = performance.now();
    if (found.first === null) {
      found.first = found.last;
      setText(byId("chat-told"), "");
    }
    const isAtEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 40;
    answer.words.appendData(choice.delta.content);
    if (isAtEnd) this.box.scrollTop = this.box.scrollHeight;
  }
}

function summary({ begun, first, last, usage, reason }) {
  const parts = [];
  if (usage) parts.push(count(usage.completion_tokens, "token"));
  if (first !== null) parts.push(`first after ${shortTime((first - begun) / 1000)}`);
  if (usage && last - first > MIN_MS) parts.push(`${oneDigit.format(1000 * (usage.completion_tokens - 1) / (last - first))} tokens/s`);
  if (reason === "length") parts.push("cut at max tokens");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}
