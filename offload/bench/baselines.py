"""What people use today, each as it is documented: transformers' model on the device, Accelerate's offloading, DeepSpeed's
ZeRO-Inference. All get the same tensors, the same dtype and a plain greedy loop with transformers' own cache: one forward a
token and nothing else, which favours them over `generate`."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..config import bytes_text
from ..device import Device, cuda, open_device
from ..device.host import available_bytes
from ..model.transformers_api import PlainForward
from ..source import ModelSource, check_source
from .case_and_outcome import Case
from .deepspeed import open_deepspeed
from .materialise import build_model
from .measure import CannotRun

SPARE = 0.9  # of a memory budget may be weights; the rest is for activations and keys and values


class ForwardDecoder:
    predicted_pass_s: float | None = None

    def __init__(self, model: Any, device: Device) -> None:
        self._model, self._device = model, device

    def decode(self, prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> Iterator[tuple[int, ...]]:
        forward = PlainForward(self._model)
        token_ids = torch.tensor([prompt], device=self._device.torch_device)
        for _ in range(max_new_tokens):
            token_ids = forward(token_ids).argmax(-1, keepdim=True).to(self._device.torch_device)
            yield (int(token_ids),)

    def facts(self) -> dict[str, Any]:
        is_cpu = self._device.torch_device.type == "cpu"
        return {"device": self._device.name, "device_peak_bytes": None if is_cpu else self._device.peak_bytes()}


@contextmanager
def open_baseline(case: Case) -> Iterator[ForwardDecoder]:
    """CannotRun with the reason when it does not fit. Whether it is installed and for this machine: see engines.py."""
    library, _, variant = case.engine.partition("-")
    with ExitStack() as stack:
        device = open_device(case.settings.device, None)
        stack.callback(device.close)
        if device.torch_device.type == "cuda" and case.settings.gpu_memory_bytes is not None:
            cuda.cap_memory(case.settings.gpu_memory_bytes)
        source = check_source(case.settings.model, "--model", case.settings.dtype, device.torch_device.type)
        if library == "transformers":
            model = _resident(source, device, case)
        elif library == "accelerate":
            model = _accelerate(variant, source, device, case, stack)
        else:
            model = open_deepspeed(variant, source)
        yield ForwardDecoder(model, device)


def _resident(source: ModelSource, device: Device, case: Case) -> Any:
    needed, room = _weight_bytes(source), round(_device_bytes(device, case) * SPARE)
    if needed > room:
        raise CannotRun(f"does not fit: {bytes_text(needed)} of weights, room for {bytes_text(room)}")
    return build_model(source).to(device.torch_device)


def _accelerate(variant: str, source: ModelSource, device: Device, case: Case, stack: ExitStack) -> Any:
    import accelerate

    model = build_model(source)
    target = device.torch_device
    if variant == "disk":
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="treestream-bench-"))
        accelerate.disk_offload(model, folder, execution_device=target)
    elif variant == "dispatch":
        limits = {target.index: round(_device_bytes(device, case) * SPARE), "cpu": available_bytes() + _weight_bytes(source)}
        places = accelerate.infer_auto_device_map(
            model, max_memory=limits, no_split_module_classes=_layer_classes(model, source)
        )
        accelerate.dispatch_model(model, device_map=places, main_device=target.index)
    else:
        preload = _layer_classes(model, source) if variant == "preload" else None
        accelerate.cpu_offload(model, execution_device=target, preload_module_classes=preload)
    return model


def _layer_classes(model: Any, source: ModelSource) -> list[str]:
    return [type(model.get_submodule(f"{source.architecture.prefix}.0")).__name__]


def _weight_bytes(source: ModelSource) -> int:
    model = source.model
    return sum(codec.computed.num_bytes for codec in model.codecs) + model.outside_layout.num_bytes


def _device_bytes(device: Device, case: Case) -> int:
    return case.settings.gpu_memory_bytes or device.free_bytes()
