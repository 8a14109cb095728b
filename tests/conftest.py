"""Fixtures: tiny random models on disk, as transformers writes them, and the devices to run them on."""

import json
import os
import signal
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Read when triton is imported, which models of transformers do: kernels run in its interpreter where there is no GPU.
os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from transformers import AutoConfig, AutoModelForCausalLM

from fakes import DEVICES
from offload.calibrate import QUICK, Effort, Subject, measure_hardware
from offload.calibrate.models import measure_model
from offload.calibrate.stopwatch import Stopwatch
from offload.device import Device
from offload.model.probe import probe_layers
from offload.model.rope import Rope
from offload.model.transformers_api import _PassLayer
from offload.planner.hardware import HardwareProfile, MeasuredModel, TaskTimes

# Matrices this small gain nothing from a second thread, and threads that wait for each other lose a busy machine.
torch.set_num_threads(1)
# How long an example takes is up to who else uses the machine.
settings.register_profile("treestream", deadline=None)
settings.load_profile("treestream")

MATRIX_SHARE = 4  # one case of so many runs in the fast suite
VOCAB_SIZE = 97
EOS = 96
TINY_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def save_tiny_model(
    folder: Path, family: str = "llama", *, num_layers: int = 3, seed: int = 0, dtype: str = "float32", **changes: object
) -> Path:
    """A random model of `family`; weights are wide enough for its greedy text to vary."""
    settings: dict[str, object] = {
        **TINY_SIZES,
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 160,
        "initializer_range": 0.4,
        "sliding_window": None,
    }
    config = AutoConfig.for_model(family, **{**settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def reference_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("qwen3", num_layers=2)` -> folder of that tiny model, made once per session."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: object) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp("model"), family, **changes)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(autouse=True, scope="session")
def heeded_interrupts() -> Iterator[None]:
    """Started in the background, as CI may be, the tests and their children would inherit a SIGINT that is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True, scope="session")
def quick_measurement() -> Iterator[None]:
    """Engines that are opened without a profile look at this machine for milliseconds, and once for models of the same
    sizes: what they plan with is real, and coarse. Whoever tests the measurement itself calls it. For the session, as engines
    of module fixtures measure, too."""
    brief = replace(QUICK, rows=(1, 64), contexts=(64,), repeats=1, point_s=0.0, copy_bytes=2**16, disk_s=0.01)
    measured: dict[tuple[object, ...], HardwareProfile] = {}

    def measure_once(device: Device, subjects: list[Subject], effort: Effort, **options: Any) -> HardwareProfile:
        sizes = tuple((subject.role, subject.model.cost, subject.model.dtype) for subject in subjects)
        key = (type(device), sizes, effort.sampling_kinds, options["link_bytes_per_s"], options["disk"] is None)
        if key not in measured:
            measured[key] = measure_hardware(device, subjects, replace(brief, sampling_kinds=effort.sampling_kinds), **options)
        return measured[key]

    def look_at_model(watch: Stopwatch, subject: Subject, drawing: TaskTimes) -> MeasuredModel:
        effort = replace(brief, sampling_kinds=watch.effort.sampling_kinds)
        return measure_model(Stopwatch(watch.device, effort), subject, drawing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.calibrate.measuring.measure_hardware", measure_once)
        patch.setattr("offload.calibrate.measuring.measure_model", look_at_model)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_look_at_each_model() -> Iterator[None]:
    """The pass over a model on the meta device takes a tenth of a second, and the tests open the same few models a thousand
    times: what it finds is kept for a config and the code that would run. What it refuses is looked at anew. Whoever tests
    the look itself calls it."""
    known: dict[tuple[object, ...], Any] = {}

    def look_once(model: torch.nn.Module, rope: Rope, num_layers: int) -> Any:
        code = frozenset([_PassLayer.update, *(type(module).forward for module in model.modules())])
        key = (model.config.to_json_string(use_diff=False), code, num_layers)
        if key not in known:
            known[key] = probe_layers(model, rope, num_layers)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.model.architecture.probe_layers", look_once)
        yield


@pytest.fixture(params=sorted(DEVICES))
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every test that streams runs on all three: a plain CPU, copies that land at once, copies that land last."""
    device = DEVICES[request.param]()
    yield device
    device.close()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """A machine that is lent for its GPU has pytest without its plugins: their settings are known all the same."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed: ignored")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed: ignored")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _thin_matrices(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _thin_matrices(items: list[pytest.Item]) -> None:
    """Cases of a `matrix` are slow but for a part of them, which follows no pattern and is the same wherever it is chosen."""
    matrices = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("matrix") is not None:
            matrices[item.nodeid.partition("[")[0]].append(item)
    for cases in matrices.values():
        cases.sort(key=lambda item: zlib.crc32(item.name.encode()))
        for item in cases[-(-len(cases) // MATRIX_SHARE) :]:
            item.add_marker(pytest.mark.slow)
