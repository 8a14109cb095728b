"""Measures what a machine does with real work: copies over the link, reads from disk, forward passes of the very layers that
will run, drawing and verifying.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from tree.acceptance import Acceptance

from ..device import Device
from ..planner.cost import layer_flops
from ..planner.hardware import HardwareProfile
from ..planner.tree_flag import DEFAULT_ACCEPTANCE, read_acceptance
from ..weights.checkpoint import Checkpoint
from ..weights.disk_speed import measure_disk
from .decoding import measure_decoding
from .draw_and_verify import measure_drawing, measure_verification
from .effort import Effort
from .link import busy_link, measure_idle_link
from .models import Subject, measure_model
from .stopwatch import Stopwatch

DISK_BYTES = 8 * 2**30


def measure_hardware(
    device: Device,
    subjects: Sequence[Subject],
    effort: Effort,
    *,
    link_bytes_per_s: float | None = None,
    disk: Checkpoint | None = None,
    acceptance: Acceptance | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> HardwareProfile:
    """Measure `device` with `subjects`, the target first. `link_bytes_per_s` is taken as it is where it is known, as that
    of an emulated link; `disk` is a checkpoint to read from; trees for `acceptance`, or the published one, are verified.
    `progress` is told what is measured next."""
    # Without a link to emulate, a CPU copies with the cores that compute, whenever they have time.
    beside_copies = not device.host_addressable or link_bytes_per_s is not None
    if link_bytes_per_s is None:
        progress("link")
        link_bytes_per_s = measure_idle_link(device, effort.copy_bytes, effort.repeats)
    watch, cost = Stopwatch(device, effort), subjects[0].model.cost
    acceptance = acceptance or read_acceptance(DEFAULT_ACCEPTANCE)
    models = []
    with busy_link(device, effort.copy_bytes, link_bytes_per_s) if beside_copies else nullcontext():
        progress("drawing and verification")
        tasks = [measure_drawing(watch, cost.vocab_size, kind) for kind in effort.sampling_kinds]
        tasks += [measure_verification(watch, cost.vocab_size, kind, acceptance) for kind in effort.sampling_kinds]
        for subject in subjects:
            progress(f"{subject.role} layers")
            models.append(measure_model(watch, subject, tasks[0]))
        decoders = [measure_decoding(watch, subject.model) for subject in subjects if subject.role == "target"]
    if disk is not None:
        progress("disk")
    times, layer = models[0].times[0], cost.common_layer
    return HardwareProfile(
        device_name=device.name,
        device_type=device.torch_device.type,
        source="measured",
        device_memory_bytes=device.free_bytes(),
        link_bytes_per_s=link_bytes_per_s,
        disk_bytes_per_s=_disk_bytes_per_s(disk, effort) if disk is not None else None,
        flops_per_s=max(layer_flops(layer, rows) / s for rows, s in zip(times.rows, times.layer_s, strict=True)),
        device_memory_bytes_per_s=layer.computed_bytes / times.layer_s[0],
        models=tuple(models),
        tasks=tuple(tasks),
        decoders=tuple(decoder for decoder in decoders if decoder is not None),
        doubts=watch.doubts,
    )


def _disk_bytes_per_s(disk: Checkpoint, effort: Effort) -> float:
    speed = measure_disk(disk, effort.disk_s, DISK_BYTES)
    return speed.read_bytes / speed.read_s
