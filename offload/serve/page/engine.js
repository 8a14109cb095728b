// The panel on the right: what /v1/engine/events says, in numbers and pictures.

import { drawBars, drawTree } from "./tree.js";

const MOST_PASSES = 48;
const LINK_PASSES = 8;
const find = (id) => document.getElementById(id);
const say = (id, text) => { find(id).textContent = text; };

const seconds = (value) => (value >= 1 ? `${value.toFixed(2)} s` : `${(value * 1000).toFixed(0)} ms`);
const rate = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB/s` : `${(value / 1e6).toFixed(0)} MB/s`);
const total = (events, field) => events.reduce((sum, event) => sum + event[field], 0);

let plan = null;
let passes = [];

const handlers = {
  loading({ read_bytes, total_bytes }) {
    if (read_bytes < total_bytes) say("state", `loading, ${Math.floor((100 * read_bytes) / total_bytes)} %`);
  },

  plan(event) {
    plan = event;
    say("predicted", event.predicted_s_per_token ? seconds(event.predicted_s_per_token) : "-");
    const link = event.emulated_link ? "emulated link" : "link";
    const streamed = event.streamed_layers
      ? `${event.streamed_layers} layers streamed (${(event.bytes_per_pass / 1e9).toFixed(2)} GB a pass, ${link})`
      : "nothing streamed";
    say("plan", `${event.device}: ${streamed}, ${event.resident_layers} resident; trees of up to ${event.nodes} nodes.`);
  },

  queue({ running, waiting }) {
    say("queue", waiting ? `${waiting} waiting` : running ? "one running" : "idle");
    say("state", running ? "working" : "ready");
  },

  pass(event) {
    passes = [...passes, event].slice(-MOST_PASSES);
    drawTree(find("tree"), event.parents, event.path);
    drawBars(find("passes"), passes.map((pass) => pass.tokens), MOST_PASSES);
    const tokens = total(passes, "tokens");
    say("tree-text", `${event.parents.length} nodes verified in one pass, ${event.tokens} tokens kept.`);
    say("tokens-per-pass", (tokens / passes.length).toFixed(1));
    say("s-per-token", seconds(total(passes, "round_s") / tokens));
    say("pass-s", seconds(event.round_s));
    showLink(passes.filter((pass) => !pass.first).slice(-LINK_PASSES));
  },
};

/** Of several passes, and not of an answer's first: it finds layers that were copied in the pause before it. */
function showLink(recent) {
  if (!recent.length) return;
  const found = total(recent, "bytes_streamed") / total(recent, "round_s");
  const peak = plan?.link_bytes_per_s;
  find("link").value = peak ? Math.min(found / peak, 1) : 0;
  say("link-text", peak ? `${rate(found)} of ${rate(peak)}` : "not used");
}

export function watch() {
  const source = new EventSource("/v1/engine/events"); // connects again by itself
  source.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    handlers[event.type]?.(event);
  };
  source.onopen = () => say("state", "loading"); // what has happened already is told at once, and says more
  source.onerror = () => say("state", "no connection");
}
