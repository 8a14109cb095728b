"""What one engine is asked to do, and what came back: values that travel between processes as JSON. Knows no engine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import EngineSettings, sampling_kind
from ..errors import OffloadError

# One object a line, from an engine's process to its parent: {"event": "ready" | "pass" | "end" | "short" | "refused", ...}
Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`engine` decodes every prompt `runs` times, `max_new_tokens` tokens each, past every EOS, after `warmup` passes that do
    not count. It begins no pass after `max_seconds`, counted from before loading."""

    engine: str
    settings: EngineSettings
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    runs: int = 3
    warmup: int = 1
    max_seconds: float = 600.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    trace: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def settings_for_it(self) -> EngineSettings:
        """`settings` with what is known of the requests."""
        lengths = [len(prompt) for prompt in self.prompts]
        return replace(
            self.settings,
            sampling=sampling_kind(self.temperature, self.top_p),
            text_tokens=max(lengths) + self.max_new_tokens,
            context_tokens=(sum(lengths) // len(lengths)) + self.max_new_tokens // 2,
        )

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Case":
        prompts = tuple(tuple(prompt) for prompt in document["prompts"])
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in document["settings"].items()
        }
        return cls(**{**document, "settings": EngineSettings(**settings), "prompts": prompts})


@dataclass(slots=True)
class Sample:
    """One prompt decoded once, perhaps not to its end."""

    run: int
    prompt: int
    token_ids: list[int] = field(default_factory=list)
    pass_s: list[float] = field(default_factory=list)
    pass_tokens: list[int] = field(default_factory=list)

    @property
    def first_token_s(self) -> float | None:
        return self.pass_s[0] if self.pass_s else None

    @property
    def s_per_token(self) -> float | None:
        """Of the passes after the first, as a generation reports it."""
        later = sum(self.pass_tokens[1:])
        return sum(self.pass_s[1:]) / later if later else None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One engine's part of a benchmark. `reason` says why there is nothing, or less than was asked for. `facts` are what the
    engine says of itself; `least_s` is the shortest budget that would have allowed one pass, `error` an error of ours."""

    engine: str
    reason: str | None = None
    least_s: float | None = None
    error: dict[str, Any] | None = None
    load_s: float | None = None
    samples: list[Sample] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        return any(sample.pass_s for sample in self.samples)

    def to_json(self) -> list[dict[str, Any]]:
        """A record for each sample."""
        return [
            {
                "engine": self.engine,
                **asdict(sample),
                "first_token_s": sample.first_token_s,
                "s_per_token": sample.s_per_token,
            }
            for sample in self.samples
        ]


def outcome_of(engine: str, events: Iterable[Event]) -> Outcome:
    """What the events of an engine's process add up to, wherever they ended."""
    outcome = Outcome(engine=engine, reason="it ended without a word")
    for event in events:
        if event["event"] == "ready":
            outcome.reason, outcome.load_s, outcome.facts = "its time was over", event["load_s"], dict(event["facts"])
        elif event["event"] == "pass":
            _add_pass(outcome.samples, event)
        elif event["event"] == "end":
            outcome.reason = None if event["complete"] else "its time was over"
            outcome.facts = {**outcome.facts, **event["facts"]}
        elif event["event"] == "short":
            outcome.reason, outcome.least_s = "its time is too short for one pass", event["least_s"]
        else:
            outcome.reason, outcome.error = event["reason"], event.get("error")
    return outcome


def _add_pass(samples: list[Sample], event: Event) -> None:
    if not samples or (samples[-1].run, samples[-1].prompt) != (event["run"], event["prompt"]):
        samples.append(Sample(event["run"], event["prompt"]))
    samples[-1].token_ids += event["token_ids"]
    samples[-1].pass_s.append(event["s"])
    samples[-1].pass_tokens.append(len(event["token_ids"]))


def error_to_json(error: OffloadError) -> dict[str, Any]:
    return {"exit_code": error.exit_code, "what": error.what, "where": error.where, "cure": error.cure}


def as_error(document: dict[str, Any]) -> OffloadError:
    """What `error_to_json` took apart: the same words, the same exit code."""
    kinds: list[type[OffloadError]] = [OffloadError, *OffloadError.__subclasses__()]
    kind = next(kind for kind in kinds if kind.exit_code == document["exit_code"])
    return kind(document["what"], where=document["where"], cure=document["cure"])


def tokens_by_prompt(outcome: Outcome) -> dict[int, Sequence[int]]:
    """The longest text of each prompt."""
    longest: dict[int, Sequence[int]] = {}
    for sample in outcome.samples:
        if len(sample.token_ids) > len(longest.get(sample.prompt, ())):
            longest[sample.prompt] = sample.token_ids
    return longest
