"""A trace shows what happened: every lane, real overlap, in a format that Perfetto opens; and as a picture."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fakes import RefusingDevice
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.report.trace import LANES, Trace
from planning import L40

Models = Callable[..., Path]


def traced_run(folder: Path) -> Trace:
    trace = Trace()
    layer_bytes = 40_000
    settings = EngineSettings(
        model=str(folder),
        draft_models=(str(folder),),
        tree="2x2:kary",
        device="cpu",
        resident_layers=1,
        slots=2,
        host_memory_bytes=3 * layer_bytes,
        emulate_link_bytes_per_s=5e6,
    )
    with open_engine(settings, trace=trace, hardware=L40) as engine:
        engine.loop._plan = replace(engine.plan, ahead_steps=2)
        engine.generate([1, 2, 3], max_new_tokens=9, ignore_eos=True)
    return trace


def test_all_lanes_are_there_and_copies_overlap_with_compute(models: Models, tmp_path: Path) -> None:
    trace = traced_run(models(num_layers=6))
    trace.save(tmp_path / "trace.json")
    document: Any = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert {names[event["tid"]] for event in events} == set(LANES)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    by_lane = {lane: [e for e in events if names[e["tid"]] == lane] for lane in LANES}
    assert any(
        copy["ts"] < use["ts"] + use["dur"] and use["ts"] < copy["ts"] + copy["dur"]
        for copy in by_lane["link"]
        for use in by_lane["compute"]
    )
    for lane in ("link", "compute"):  # one thing at a time on each
        ordered = sorted(by_lane[lane], key=lambda event: event["ts"])
        for before, after in pairwise(ordered):
            assert before["ts"] + before["dur"] <= after["ts"] + 1


def test_a_layer_is_computed_only_after_its_copy_has_landed(models: Models) -> None:
    spans = list(traced_run(models(num_layers=6)).spans)
    links = {}
    for span in spans:
        if span.lane == "link":
            links[span.name] = span
    last = {span.name: span for span in spans if span.lane == "compute"}
    for name, copy in links.items():
        assert copy.end_s <= last[name].start_s + 1e-6


def test_the_ring_tells_what_was_read_from_what_was_moved(models: Models) -> None:
    """Six layers of which two are on disk; of the four in memory the device pins none beside the ring."""
    folder, trace, device = models(num_layers=6), Trace(), RefusingDevice()
    settings = EngineSettings(model=str(folder), tree="none", device="cpu", resident_layers=0, slots=2)
    with open_engine(settings, hardware=L40) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    device.room_bytes = 2 * layer_bytes
    settings = replace(settings, host_memory_bytes=5 * layer_bytes)
    with open_engine(settings, trace=trace, device=device, hardware=L40) as engine:
        engine.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)
        on_disk = engine.plan.placement.disk
    names = {span.name for span in trace.spans if span.lane == "ring"}
    assert names == {f"{'read' if layer in on_disk else 'move'} layer {layer}" for layer in range(6)}
    assert 0 < len(on_disk) < 6


def test_the_timeline_is_a_picture(models: Models, tmp_path: Path) -> None:
    trace = traced_run(models(num_layers=6))
    trace.save(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
