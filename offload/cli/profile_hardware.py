"""`profile hardware`: measure this machine with the layers of the models that will run, and write the profile down."""

import argparse
import json
import platform
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ..coding.base_kinds import BASE_KINDS, BaseKind
from ..config import EngineSettings, base_of_draft
from ..demo import DRAFT, TARGET
from ..errors import UsageError
from ..planner.hardware_file import PRESETS, to_json
from ..report.report import environment
from .acceptance import write_json
from .flags_to_settings import check_writable, warn_of_releases
from .signals import leaving_at_once
from .terminal import PartBar, say

if TYPE_CHECKING:
    from ..device import Device
    from ..planner.hardware import HardwareProfile
    from ..typed_model import TypedModel
    from ..weights.checkpoint import Checkpoint

COPY_SIZES = tuple(2**power for power in range(20, 31, 2))


def run(arguments: argparse.Namespace) -> int:
    model, drafts = arguments.model, [name for name in arguments.draft_model or [] if name != "none"]
    if model is None:
        model, drafts = str(TARGET), drafts or [str(DRAFT)]
        if not arguments.quiet:
            say("no --model given: the layers of the bundled demo pair are measured")
    settings = EngineSettings.parse(
        model=model, draft_model=drafts, device=arguments.device, dtype=arguments.dtype, emulate_link=arguments.emulate_link
    )
    if arguments.output and arguments.output != "-":
        check_writable("--output", Path(arguments.output))
    warn_of_releases(quiet=arguments.quiet)
    with leaving_at_once():
        from ..device import device_of

    device = device_of(settings)
    try:
        profile = _measure(settings, device, quiet=arguments.quiet)
    finally:
        device.close()
    document = to_json(profile)
    if arguments.output == "-":
        print(json.dumps(document))
        return 0
    path = Path(arguments.output) if arguments.output else PRESETS / file_name(profile.device_name)
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder", where="--output", cure="name a file in an existing folder")
    write_json(path, document)
    if not arguments.quiet:
        say(f"{path}\n  use it with --profile {path}")
    return 0


def file_name(device_name: str) -> str:
    """`nvidia-l40_myhost_2026-11-21.json`."""
    device, host = (re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in (device_name, platform.node()))
    return f"{device}_{host}_{datetime.now(timezone.utc):%Y-%m-%d}.json"


def _measure(settings: EngineSettings, device: "Device", *, quiet: bool) -> "HardwareProfile":
    from ..calibrate import FULL, QUICK, Subject, measure_copies, measure_hardware, own_threads
    from ..device.host import available_bytes

    target, disk = _typed(settings.model, "--model", settings, device)
    subjects = [Subject(role="target", model=target)]
    for name in settings.draft_models:
        kind = base_of_draft(name)
        model = _typed(name, "--draft-model", settings, device)[0] if kind is None else _base_of(target, BASE_KINDS[kind])
        subjects.append(Subject(role="draft", model=model))
    emulated = settings.emulate_link_bytes_per_s
    threads = own_threads(subjects, QUICK) if device.host_addressable else nullcontext()
    with threads, PartBar(len(subjects) + 2 + (emulated is None) + (disk is not None), enabled=not quiet) as progress:
        profile = measure_hardware(device, subjects, FULL, link_bytes_per_s=emulated, disk=disk, progress=progress.begin)
        progress.begin("copies by size")
        copies = measure_copies(device, COPY_SIZES, FULL.repeats)
    return replace(
        profile,
        pageable_link_bytes_per_s=copies["pageable"][COPY_SIZES[-1]],
        source="measured" + (" with an emulated link" if emulated else ""),
        host_memory_bytes=available_bytes(),
        facts={
            "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": platform.processor() or platform.machine(),
            "models": ["/".join(Path(name).parts[-2:]) for name in (settings.model, *settings.draft_models)],
            **environment(device.name),
            **_machine(device),
            "link_bytes_per_s_by_copy": copies,
        },
    )


def _typed(name: str, flag: str, settings: EngineSettings, device: "Device") -> tuple["TypedModel", "Checkpoint | None"]:
    """A preset has a shape and nothing to read from disk; a folder has both."""
    from ..planner.shapes import is_preset
    from ..source import check_source
    from ..typed_model import typed_preset

    device_type = device.torch_device.type
    if is_preset(name):
        return typed_preset(name, settings.dtype, device_type), None
    kernels, codec = settings.decode_kernels, settings.codec
    source = check_source(name, flag, settings.dtype, device_type, codec=codec, decode_kernels=kernels)
    return source.model, source.checkpoint


def _base_of(target: "TypedModel", kind: BaseKind) -> "TypedModel":
    """What drafts is measured without being made: its weights are noise. Where there is a base of some kind, it is that."""
    from ..typed_model import base_draft, with_bases

    return base_draft(target if target.base is not None else with_bases(target, kind))


def _machine(device: "Device") -> dict[str, object]:
    """What people want to know of a machine when they compare profiles; the planner reads none of it."""
    from ..doctor.gather import gather_facts

    facts = gather_facts(model=None, draft_model=None, device=str(device.torch_device))
    return {
        "host_facts": _plain(asdict(facts.host)),
        "gpu_facts": _plain(asdict(facts.gpu)) if facts.gpu else None,
        "registration": asdict(facts.copies) if facts.copies else None,
    }


def _plain(values: dict[str, object]) -> dict[str, object]:
    """As JSON has it: no sets."""
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()}
