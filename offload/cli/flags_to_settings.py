"""From parsed flags to settings, the same for every command that loads a model."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import EngineSettings, base_of_draft, sampling_kind
from ..demo import DRAFT, LINK, TARGET, acceptance_at
from ..errors import ModelError, UsageError
from ..model.locate import check_name
from ..planner.shapes import is_preset
from ..planner.tree_flag import read_acceptances, read_tree
from ..scale.preset import PREFIX as SCALE_PREFIX
from .terminal import say

UNSAID_TEMPERATURE = 1.0  # `serve` has no flag for it: requests say it, and this is what OpenAI's protocol means if they do not


def engine_settings(arguments: argparse.Namespace, *, emulate_demo_link: bool) -> EngineSettings:
    """What the model flags say. Without --model the bundled demo pair runs: on the CPU over its emulated link where
    `emulate_demo_link`, as a command that shows streaming wants it. `check_and_announce_models` then says so on stderr."""
    model, draft_model, emulate_link = arguments.model, arguments.draft_model, arguments.emulate_link
    acceptance = arguments.acceptance
    temperature = getattr(arguments, "temperature", UNSAID_TEMPERATURE)
    if model is not None and model.startswith(SCALE_PREFIX) and draft_model is None:  # the demo target's function: its draft
        draft_model, acceptance = str(DRAFT), acceptance or str(acceptance_at(temperature))
    if model is None:
        model, draft_model = str(TARGET), [str(DRAFT)] if draft_model is None else draft_model
        drafts = [name for name in draft_model if name != "none"]
        acceptance = acceptance or [str(acceptance_at(temperature, base_of_draft(name))) for name in drafts]
        if emulate_link is None and emulate_demo_link and not arguments.device.startswith("cuda"):
            emulate_link = LINK
    settings = EngineSettings.parse(
        model=model,
        draft_model=draft_model,
        verifier=arguments.verifier,
        acceptance=acceptance,
        device=arguments.device,
        emulate_link=emulate_link,
        small_uploads=arguments.small_uploads,
        decode_kernels=arguments.decode_kernels,
        fixed_plan=arguments.fixed_plan,
        **plan_flags(arguments),
    )
    if arguments.model is None:  # the bundled pair is there to show trees
        settings = replace(settings, needs_tree=True)
    return replace(settings, sampling=sampling_kind(temperature, getattr(arguments, "top_p", 1.0)))


def plan_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that a plan depends on, by name: those that `plan` has, too."""
    memory = ("gpu_memory", "host_memory", "resident_layers", "slots", "max_context")
    drafting = ("ngram", "grow_ahead", "draft_device", "draft_passes")
    return {name: getattr(arguments, name) for name in ("tree", "profile", "dtype", "codec", *memory, *drafting)}


def check_small_files(settings: EngineSettings) -> None:
    """UsageError or ModelError for what the tree, the acceptance and the hardware profile tell before any model is read."""
    read_tree(settings.tree, has_draft=bool(settings.draft_models), ngram=settings.ngram)
    read_acceptances(settings)
    if settings.profile is not None:
        from ..planner.hardware_file import find_hardware  # numpy

        find_hardware(settings.profile)


def check_and_announce_models(arguments: argparse.Namespace, settings: EngineSettings) -> None:
    """ModelError for a model that is nowhere, and for a preset, which has no weights. Then stderr is told which models run when
    none was named, and of untested releases. It is called when all flags are right: a usage error stays one line."""
    for flag, name in [("--model", settings.model), *(("--draft-model", draft) for draft in settings.other_drafts)]:
        if name.startswith(SCALE_PREFIX):
            continue
        if is_preset(name):
            raise ModelError(
                f"{name} is a preset, a shape without weights",
                where=flag,
                cure=f"give a folder or a hub id; `plan` needs no weights, and scale:{name} makes some",
            )
        check_name(name, flag)
    if arguments.model is None and not arguments.quiet:
        emulated = settings.emulate_link_bytes_per_s is not None
        say(
            "no --model given: the bundled demo pair (5.5 M parameters and a draft of 0.5 M)"
            + (f", streamed over an emulated link of {arguments.emulate_link or LINK}" if emulated else "")
            + "\n  a real model: --model PATH_OR_HUB_ID --draft-model PATH_OR_HUB_ID"
        )
    warn_of_releases(quiet=arguments.quiet)


def warn_of_releases(*, quiet: bool) -> None:
    """One line when dependencies are of releases that nobody tried with this version."""
    from ..releases import warning

    if not quiet and (text := warning()) is not None:
        say(f"warning: {text}")


def check_writable(flag: str, path: Path) -> None:
    """UsageError when `path` cannot be a file; said before a run of an hour, not after it."""
    try:
        reason = "it is a folder" if path.is_dir() else None
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            reason = f"{path.parent} is not a folder that can be written to"
    except OSError as error:
        reason = str(error.strerror)
    if reason is not None:
        raise UsageError(f"cannot write {path}: {reason}", where=flag, cure="name a file in an existing folder")
