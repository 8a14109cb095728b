"""Numbers of a run: per pass, and summed up as the command line reports them. Pure values; knows no device."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStats:
    """One round: draft_s until the first layer is asked for, pass_s until the last one is computed, verify_s the rest, the head
    included. `stall_s` is compute waiting for copies, summed over layers; `copied_s` is the time copies were under way.
    `ahead_s` are steps of drafts between layers, where these keep the host; by `late_s` layers were late for them.

    Of `num_rows` rows `num_nodes` were a tree's, of which `foreseen_nodes` had been grown while the pass before ran;
    `ahead_nodes` were grown while this one did. Of the tokens emitted, `ngram_tokens` were found in a text."""

    num_rows: int
    num_nodes: int
    emitted_tokens: int
    ngram_tokens: int = 0
    foreseen_nodes: int = 0
    ahead_nodes: int = 0
    ahead_s: float = 0.0
    late_s: float = 0.0
    bytes_streamed: int
    draft_s: float
    pass_s: float
    verify_s: float
    round_s: float
    stall_s: float
    stall_by_layer_s: tuple[float, ...]
    copied_s: float

    @property
    def compute_s(self) -> float:
        """Of the pass, what neither waited for copies nor for drafts."""
        return max(self.pass_s - self.stall_s - self.late_s, 0.0)


@dataclass(slots=True)
class RunStats:
    """A run as it grows. Times in seconds; first_token_s ends with the first pass, decode_s is the rest. `reused_tokens` of
    the prompt went through no pass: an earlier request had begun with them. `passes_before_plan` ran before the plan changed
    that ran last."""

    load_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    reused_tokens: int = 0
    first_tokens: int = 0
    num_tokens: int = 0
    passes_before_plan: int = 0
    passes: list[PassStats] = field(default_factory=list)

    def add(self, one: PassStats, num_tokens: int, seconds: float) -> None:
        """A pass that gave the text `num_tokens` tokens, `seconds` after the one before it, or after the request."""
        if not self.passes:
            self.first_token_s, self.first_tokens = seconds, num_tokens
        else:
            self.decode_s += seconds
        self.num_tokens += num_tokens
        self.passes.append(one)

    @property
    def s_per_token(self) -> float | None:
        later = self.num_tokens - self.first_tokens
        return self.decode_s / later if later > 0 else None

    @property
    def tokens_per_pass(self) -> float | None:
        return sum(p.emitted_tokens for p in self.passes) / len(self.passes) if self.passes else None

    @property
    def nodes_per_pass(self) -> float | None:
        return sum(p.num_nodes for p in self.passes) / len(self.passes) if self.passes else None

    @property
    def wasted_nodes(self) -> int:
        """That were grown ahead and were in no tree since."""
        return max(sum(p.ahead_nodes for p in self.passes) - sum(p.foreseen_nodes for p in self.passes), 0)

    @property
    def link_bytes_per_s(self) -> float | None:
        """Streamed bytes over wall time of the decode rounds: what the whole loop got out of the link."""
        decode = self.passes[1:]
        seconds = sum(p.round_s for p in decode)
        return sum(p.bytes_streamed for p in decode) / seconds if seconds > 0 else None

    @property
    def stall_s(self) -> float:
        return sum(p.stall_s for p in self.passes)

    @property
    def median_pass_s(self) -> float | None:
        times = sorted(p.pass_s for p in self.passes[1:] or self.passes)
        return times[len(times) // 2] if times else None
