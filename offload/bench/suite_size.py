"""How large a suite is: the same steps on a GPU machine and on a CPU over an emulated link."""

from dataclasses import dataclass

from ..config import EngineSettings
from ..demo import ACCEPTANCE, DRAFT

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSize:
    """`budgets` are bytes of device memory for the table; the first is that of all other steps, too. Those hold `host_bytes` of
    layers only, identical layers once: the bytes per pass are the same, and loading takes seconds. Baselines run at `depths`
    layers, from which full depth is extrapolated."""

    name: str
    settings: EngineSettings
    budgets: tuple[int, ...]
    host_bytes: int | None
    new_tokens: int
    plain_tokens: int
    slots: tuple[int, ...]
    residents: tuple[int, ...]
    trees: tuple[str, ...]
    pass_nodes: tuple[int, ...]
    sweep: tuple[str, ...]
    depths: tuple[int, ...]
    baseline_tokens: int
    verify_nodes: int
    verify_vocab: int
    link_bytes: tuple[int, ...]
    step_seconds: float

    @property
    def on_gpu(self) -> bool:
        return self.settings.device != "cpu"


def gpu_size(device: str) -> SuiteSize:
    return SuiteSize(
        name="gpu",
        settings=_settings("scale:llama-2-70b", device=device),
        budgets=(48 * GIB, 24 * GIB),
        host_bytes=24 * GIB,
        new_tokens=64,
        plain_tokens=6,
        slots=(2, 3, 4),
        residents=(0, 10),
        trees=("none", "64x10", "768x18"),
        pass_nodes=(1, 16, 64, 256, 512, 768, 1024, 2048, 4096),
        sweep=("128x14", "256x16", "512x18", "768x18", "1024x20"),
        depths=(4, 8, 12),
        baseline_tokens=3,
        verify_nodes=768,
        verify_vocab=32_000,
        link_bytes=(64 * MIB, 256 * MIB, 1024 * MIB, 1632 * MIB),
        step_seconds=20.0,
    )


def cpu_size() -> SuiteSize:
    return SuiteSize(
        name="cpu",
        settings=_settings("scale:tiny-llama-shape", device="cpu", emulate_link_bytes_per_s=1e9),
        budgets=(104 * MIB, 72 * MIB),
        host_bytes=80 * MIB,
        new_tokens=12,
        plain_tokens=4,
        slots=(2, 3),
        residents=(0, 3),
        trees=("none", "4x6:kary"),
        pass_nodes=(1, 16, 64),
        sweep=("16x8", "64x10"),
        depths=(2, 4),
        baseline_tokens=3,
        verify_nodes=64,
        verify_vocab=4096,
        link_bytes=(MIB, 16 * MIB),
        step_seconds=2.0,
    )


def _settings(model: str, *, device: str, emulate_link_bytes_per_s: float | None = None) -> EngineSettings:
    return EngineSettings(
        model=model,
        draft_models=(str(DRAFT),),
        acceptances=(str(ACCEPTANCE),),
        device=device,
        emulate_link_bytes_per_s=emulate_link_bytes_per_s,
    )
