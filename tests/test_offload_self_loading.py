"""A base on its way into memory: what is refused, what is read and said of it, and what an interruption leaves."""

import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import assert_usage_error, run_command
from fakes import CountingDevice, LateDevice, RefusingLateDevice, WatchedDevice
from offload.cli.convert import conversion_of, scheme_of
from offload.demo import TARGET
from offload.errors import DeviceMemoryError
from offload.weights.bases import LayerBases
from offload.weights.codec import LayerCodec, identities
from offload.weights.conversion import convert
from offload.weights.layout import LayerLayout
from packed_models import write_packed
from self_drafts import GREEDY, NUM_LAYERS, PROMPT, open_self, text
from test_offload_loading import fills_noted

Models = Callable[..., Path]
NUM_POINTS = 10


@pytest.fixture(scope="module")
def folder(models: Models) -> Path:
    return models(num_layers=NUM_LAYERS, dtype="bfloat16")


# -- flags ----------------------------------------------------------------------------------------------------------------


def test_a_base_of_packed_weights_is_refused_and_auto_goes_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = write_packed("fp8", tmp_path).folder
    flags = ("--model", packed, "--prompt-ids", "5,9", "--max-new-tokens", 3, "--device", "cpu", "--quiet")
    for asked in (("--draft-model", "self"), ("--codec", "residual")):
        assert_usage_error(run_command(capsys, *flags, *asked), "weights are packed (FP8)", "16-bit", " ".join(asked))
    finished = run_command(capsys, *flags, "--draft-model", "auto")
    assert finished.code == 0 and finished.stdout.strip()


def test_a_base_of_another_kind_than_a_folder_has_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(conversion_of(str(folder), str(tmp_path / "coded"), scheme_of("residual", "int8")))
    flags = ("--model", tmp_path / "coded", "--prompt-ids", "5,9", "--device", "cpu", "--max-new-tokens", 3, "--quiet")
    finished = run_command(capsys, *flags, "--draft-model", "self:int4")
    assert_usage_error(finished, "int8", "--draft-model self:int4", "self:int8")
    assert run_command(capsys, *flags, "--draft-model", "self:int8").code == 0


def test_two_bases_and_one_that_there_is_not_are_refused_before_anything_is_looked_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    two = run_command(capsys, "--model", "nowhere", "--prompt", "x", "--draft-model", "self", "--draft-model", "self:int8")
    assert_usage_error(two, "more than one base", "--draft-model")
    assert_usage_error(run_command(capsys, "--model", "nowhere", "--draft-model", "self:int7"), "'int7'", "int8, int4, int3")
    assert_usage_error(run_command(capsys, "doctor", "--draft-model", "self:int7"), "'int7'", "int8, int4, int3")


# -- what commands say of it ------------------------------------------------------------------------------------------------


def test_a_run_says_what_travels_and_what_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And acceptance that is recorded names the base."""
    recorded = tmp_path / "acceptance.json"
    flags = ("--draft-model", "self:int8", "--tree", "1x6:kary", "--device", "cpu", "--quiet", "--resident-layers", 2)
    asked = ("--prompt", "The people of", "--max-new-tokens", 16, "--json", "--record-acceptance", recorded)
    finished = run_command(capsys, "--model", TARGET, *flags, *asked)
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["environment"]["weights"] == "bfloat16, coded beside a base of int8"
    assert report["streaming"]["codecs"] == {"residual bfloat16": 4}
    ledger = {name: num_bytes for name, num_bytes in report["plan"]["device_bytes"].items() if name.startswith("base of")}
    assert [report["memory"]["device_base_bytes"]] == list(ledger.values()) and max(ledger.values()) > 0
    assert report["streaming"]["raw_bytes_per_pass"] > 4 * report["streaming"]["bytes_per_pass"]
    assert report["speculation"]["tokens_per_pass"] > 3
    assert json.loads(recorded.read_text(encoding="utf-8"))["draft"] == "self:int8"


@pytest.mark.slow
def test_acceptance_of_a_base_is_measured_as_that_of_any_draft(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", TARGET, "--draft-model", "self:int8", "--device", "cpu", "--max-new-tokens", 6, "--quiet")
    profile = json.loads(run_command(capsys, "profile", "acceptance", "--tree", "1x4:kary", *flags).stdout)
    assert profile["draft"] == "self:int8" and profile["acceptance"][0] > 0.8
    asked = ("--trees", "1x4:kary", "--temperatures", "0", "--prompt", "The people of", "--json")
    spec = json.loads(run_command(capsys, "bench", "spec", *flags, *asked).stdout)
    assert spec["model"]["draft"] == "self:int8" and spec["summary"][0]["tokens_per_pass"] > 2


def test_a_base_has_nothing_of_its_own_for_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run_command(capsys, "doctor", "--model", TARGET, "--device", "cpu", "--json")
    found = run_command(capsys, "doctor", "--model", TARGET, "--draft-model", "self", "--device", "cpu", "--json")
    names = [[finding["name"] for finding in json.loads(one.stdout)["findings"]] for one in (alone, found)]
    assert names[0] == names[1]


# -- reading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("make_device", [LateDevice, RefusingLateDevice])
@pytest.mark.parametrize("codec", ["none", "lossless", "residual"])
def test_as_much_is_read_as_was_announced(folder: Path, codec: str, make_device: Callable[[], LateDevice]) -> None:
    for residency, disk in (("none", 0), ("some of each", 0), ("none", 3)):
        read: list[tuple[int, int]] = []
        changes: dict[str, Any] = {}
        if disk:
            with open_self(folder, "self:int4", codec=codec, residency=residency) as engine:
                changes["host_memory_bytes"] = disk * engine.loop._stream.slot_bytes
        opened = open_self(
            folder,
            "self:int4",
            codec=codec,
            residency=residency,
            device=make_device(),
            progress=lambda done, total, read=read: read.append((done, total)),
            **changes,
        )
        with opened as engine:
            assert bool(engine.plan.placement.disk) == bool(disk)
            done, total = read[-1]
            assert done == total > 0


@pytest.mark.matrix
@pytest.mark.parametrize("residency", ["none", "some of each"])
def test_an_interruption_at_ten_points_of_loading_leaves_nothing(folder: Path, residency: str) -> None:
    whole = WatchedDevice()
    with fills_noted(whole), open_self(folder, codec="residual", residency=residency, device=whole):
        pass
    threads, num_calls = set(threading.enumerate()), len(whole.calls)
    points = sorted({round(1 + (num_calls - 1) * part / (NUM_POINTS - 1)) for part in range(NUM_POINTS)})
    assert len(points) == NUM_POINTS and {"alloc", "pin", "fill", "copy"} <= set(whole.calls)
    gc.collect()
    gc.disable()
    try:
        for point in points:
            device = WatchedDevice(point)
            opened = open_self(folder, codec="residual", residency=residency, device=device)
            try:
                with fills_noted(device), opened:
                    pass
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("it was not interrupted")
            del opened
            assert (device.held_bytes, device.num_under_way) == (0, 0), device.calls[-1]
            assert set(threading.enumerate()) <= threads
    finally:
        gc.enable()


def test_an_engine_that_is_closed_holds_no_base(folder: Path) -> None:
    device = CountingDevice()
    with open_self(folder, codec="residual", residency="some of each", device=device) as engine:
        text(engine)
        assert device.held_bytes > engine.memory().device_base_bytes > 0
    assert device.held_bytes == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_have_a_base_too(models: Models, dtype: str) -> None:
    """float16 is coded beside it; float32, of which nothing is coded, travels as it is and is drafted for."""
    folder = models(num_layers=NUM_LAYERS, dtype=dtype)
    with open_self(folder, None, codec="none") as engine:
        expected, raw_bytes = text(engine), engine.plan.bytes_per_pass
    with open_self(folder, "self:int8", residency="some of each") as engine:
        assert text(engine) == expected and engine.weights.is_coded == (dtype == "float16")
        assert engine.memory().device_base_bytes > 0 and engine.plan.bytes_per_pass < raw_bytes
    with open_self(folder, None, codec="residual") as engine:  # a base that nobody uses is not made
        assert text(engine) == expected and (engine.memory().device_base_bytes > 0) == (dtype == "float16")


@pytest.mark.slow
def test_weights_that_were_coded_without_loss_get_a_base(folder: Path, tmp_path: Path) -> None:
    convert(conversion_of(str(folder), str(tmp_path / "coded"), scheme_of("lossless", None)))
    with open_self(folder, None, codec="none") as engine:
        expected = text(engine)
    for codec, format in (("auto", "residual bfloat16"), ("lossless", "lossless bfloat16"), ("none", "none")):
        with open_self(tmp_path / "coded", "self:int4", codec=codec, residency="some raw") as engine:
            report = engine.generate(PROMPT, **GREEDY)
            assert report.token_ids == expected
            assert list(engine.weights.codecs(engine.plan.placement.streamed)) == [format]


# -- memory -----------------------------------------------------------------------------------------------------------------


class FullDevice(LateDevice):
    def alloc(self, num_bytes: int) -> torch.Tensor:
        raise DeviceMemoryError("full", where="device", cure="none")


def test_bases_of_a_full_device_are_cut_from_what_leaves_it_or_not_taken_at_all() -> None:
    (raw,) = identities([{"a": (64,)}], torch.float32)
    base = LayerLayout.pack([("a.base", (256,), torch.uint8)])
    codecs = [LayerCodec(stored=raw.stored, computed=raw.computed, base=base)] * 3
    device = FullDevice()
    bases, spare = LayerBases(device, codecs), torch.zeros(600, dtype=torch.uint8)
    with pytest.raises(DeviceMemoryError):
        bases.take([0, 1, 2], [spare])
    assert bases.num_bytes == 0
    assert bases.take([0, 2], [spare]) == [0, 2] and bases.take([0, 2], [spare]) == []
    bases.views(0)["a.base"].fill_(1)
    bases.views(2)["a.base"].fill_(2)
    assert spare[:512].tolist() == [1] * 256 + [2] * 256 and bases.views(1) == {}
    bases.drop([0])
    assert bases.needed([0, 1, 2]) == [0, 1]
    device.close()
