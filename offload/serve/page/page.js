// The conversation: messages, streaming, stop, settings, keys. What the engine does is shown by engine.js.

import { watch } from "./engine.js";

const find = (id) => document.getElementById(id);

let model = null;
let messages = []; // {role, content}, as the server wants them
let answering = null; // AbortController of the answer under way

function show(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  find("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function note(item, text, kind = "note") {
  const line = document.createElement("span");
  line.className = `note ${kind}`;
  line.textContent = text;
  item.append(line);
}

/** The request for an answer to `messages`, with the settings as they are now. */
function request() {
  const system = find("system").value.trim();
  const seed = find("seed").value;
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(find("temperature").value),
    top_p: Number(find("top-p").value),
    max_tokens: Number(find("max-tokens").value),
    ...(seed === "" ? {} : { seed: Number(seed) }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Server-sent events of `response`, as {data} or {comment}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith(":")) yield { comment: block.slice(1).trim() };
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield { data: JSON.parse(block.slice(6)) };
    }
  }
}

/** Write the answer into `item` as it comes. Returns its text, also when it was stopped; throws what went wrong. */
async function receive(item, signal) {
  const text = document.createTextNode("");
  item.append(text);
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request()), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const { data, comment } of events(response)) {
      if (comment) find("progress").textContent = comment.replace("keep-alive, ", "");
      if (data?.error) throw new Error(data.error.message);
      const piece = data?.choices[0]?.delta.content ?? "";
      text.data += text.data ? piece : piece.trimStart(); // a transcript's answer begins with the space after its name
      if (data?.usage) note(item, summary(data.usage));
      if (data) item.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    note(item, "stopped");
  }
  return text.data;
}

function summary({ prompt_tokens, completion_tokens, prompt_tokens_details }) {
  const reused = prompt_tokens_details?.cached_tokens;
  return `${completion_tokens} tokens, after ${prompt_tokens}${reused ? ` (${reused} of them still known)` : ""}`;
}

async function answer() {
  const item = show("assistant", "");
  answering = new AbortController();
  showButtons();
  try {
    const text = await receive(item, answering.signal);
    messages.push({ role: "assistant", content: text });
  } catch (error) {
    note(item, error.message, "error");
    messages.pop(); // the question, so that it can be asked again
  } finally {
    answering = null;
    find("progress").textContent = "";
    showButtons();
  }
}

function showButtons() {
  find("send").hidden = answering !== null;
  find("stop").hidden = answering === null;
}

function send(event) {
  event?.preventDefault();
  const text = find("text").value.trim();
  if (!text || answering || model === null) return;
  find("text").value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  answer();
}

function startOver() {
  answering?.abort();
  messages = [];
  find("messages").replaceChildren();
  find("text").focus();
}

function onKey(event) {
  if (event.key === "Escape") answering?.abort();
  if (event.altKey && event.code === "KeyN") startOver();
  if (event.altKey && event.code === "KeyS") find("settings").showModal();
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === find("text")) send(event);
}

find("composer").addEventListener("submit", send);
find("stop").addEventListener("click", () => answering?.abort());
find("new").addEventListener("click", startOver);
find("settings-button").addEventListener("click", () => find("settings").showModal());
document.addEventListener("keydown", onKey);

const listed = await (await fetch("/v1/models")).json();
model = listed.data[0].id;
find("model").textContent = model;
watch();
