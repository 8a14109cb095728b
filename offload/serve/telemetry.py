"""What the engine is doing, for those who watch: Prometheus metrics, and a feed of events for the page.

Nothing here holds text or token ids: watching is allowed to everyone with the key, reading along is not.
"""

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.generation import Step

PREFIX = "run70b_"
# Tokens come seconds apart where weights are streamed: the buckets reach far beyond a web server's.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)

Event = dict[str, Any]


class Telemetry:
    """Written by the worker's thread, read by the server's. `publish` is given every event; it must not block."""

    def __init__(self, publish: Callable[[Event], None]) -> None:
        self.registry = CollectorRegistry()
        self._publish = publish
        self._text_tokens = 1
        self._make_metrics()

    def _make_metrics(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=SECONDS, registry=self.registry)

        self._first_token = histogram("time_to_first_token_seconds", "From the arrival of a request to its first tokens")
        self._token = histogram("inter_token_latency_seconds", "Time of a pass over the tokens it brought")
        self._queued = histogram("request_queue_time_seconds", "Time a request waited")
        self._running = gauge("num_requests_running", "Requests being answered")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue")
        self._requests = counter("requests", "Requests that ended", "outcome")
        self._tokens = counter("generation_tokens", "Tokens generated")
        self._drafts = counter("spec_decode_num_drafts", "Trees verified")
        self._drafted = counter("spec_decode_num_draft_tokens", "Draft tokens verified")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted")
        self._accepted_at = counter("spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by depth", "position")
        self._bytes = counter("h2d_bytes", "Weight bytes streamed")
        self._stall = counter("h2d_stall_seconds", "Compute waiting for copies")
        self._cache = gauge("kv_cache_usage_ratio", "Tokens of the running sequence over those that the context has room for")
        self._pinned = gauge("pinned_bytes", "Host memory pinned for weights")

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def loading(self, read_bytes: int, total_bytes: int) -> None:
        self._publish({"type": "loading", "read_bytes": read_bytes, "total_bytes": total_bytes})

    def loaded(self, engine: "Engine") -> None:
        plan = engine.plan
        self._pinned.set(engine.memory().host_pinned_bytes)
        self._text_tokens = plan.text_tokens
        self._publish(
            {
                "type": "plan",
                "device": engine.device_name,
                "emulated_link": engine.emulated_link,
                "nodes": plan.tree.num_nodes,
                "levels": plan.tree.num_levels,
                "streamed_layers": len(plan.placement.streamed),
                "resident_layers": len(plan.placement.resident),
                "bytes_per_pass": plan.bytes_per_pass,
                "link_bytes_per_s": plan.link_bytes_per_s,
                "predicted_s_per_token": plan.to_json()["predicted_s_per_token"],
                "text_tokens": plan.text_tokens,
            }
        )

    def queue(self, running: bool, waiting: int) -> None:
        self._running.set(int(running))
        self._waiting.set(waiting)
        self._publish({"type": "queue", "running": int(running), "waiting": waiting})

    def began(self, waited_s: float) -> None:
        self._queued.observe(waited_s)

    def step(self, step: "Step", *, first: bool, queued_s: float, num_tokens_held: int) -> None:
        """`num_tokens_held` are those of the prompt and of the answer so far."""
        stats, num_tokens = step.stats, len(step.token_ids)
        self._cache.set(num_tokens_held / self._text_tokens)
        if first:
            self._first_token.observe(monotonic() - queued_s)
        elif num_tokens:
            self._token.observe(stats.round_s / num_tokens)
        accepted = len(step.verdict.path) - 1
        self._tokens.inc(num_tokens)
        self._drafts.inc(step.shape.num_nodes > 1)
        self._drafted.inc(step.shape.num_nodes - 1)
        self._accepted.inc(accepted)
        for position in range(accepted):
            self._accepted_at.labels(str(position)).inc()
        self._bytes.inc(stats.bytes_streamed)
        self._stall.inc(stats.stall_s)
        self._publish(
            {
                "type": "pass",
                "first": first,
                "parents": list(step.shape.parents),
                "path": list(step.verdict.path),
                "tokens": num_tokens,
                "rows": stats.num_rows,
                "bytes_streamed": stats.bytes_streamed,
                "draft_s": stats.draft_s,
                "pass_s": stats.pass_s,
                "round_s": stats.round_s,
                "stall_s": stats.stall_s,
            }
        )

    def ended(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()
