"""A checkpoint whose weights are packed runs as the model that has them unpacked, wherever its layers lie."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import save_tiny_model
from fakes import DEVICES, WatchedDevice
from offload.assemble import open_engine
from offload.coding.tensor_codec import Packing, Part, TensorCodec
from offload.config import EngineSettings
from offload.errors import CheckpointError, ModelError, OffloadError
from offload.planner.memory import MemoryPlan, plan_memory
from offload.source import check_source
from planning import L40

PROMPT = [5, 9, 33, 2, 71]


@dataclass(frozen=True, slots=True)
class Rows:
    """Bytes and a scale for each row: the packing of these tests."""

    name: str = "bytes by rows"

    def codec_of(self, parameter: str, shape: tuple[int, ...], beside: Mapping[str, Part]) -> TensorCodec | None:
        if "packed" not in beside:
            return None
        if beside["packed"].shape != shape:
            raise ValueError(f"has bytes of shape {beside['packed'].shape}, not {shape}")
        if "scale" not in beside:
            raise ValueError("has no scale beside it")
        parts = (replace(beside["packed"], dtype=torch.int8), replace(beside["scale"], is_scale=True))
        return TensorCodec(format="rows", parts=parts, decode=decode_rows)


def decode_rows(parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
    parameter.copy_(parts["packed"].float() * parts["scale"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A folder with packed weights, and one with the same weights unpacked."""

    packed: Path
    plain: Path


def matrices(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    def read(quantization: Mapping[str, object], where: str) -> Packing:
        return Rows()

    monkeypatch.setattr("offload.model.files.read_packing", read)

    def make(is_packed: Callable[[str], bool] = matrices, **changes: Any) -> Pair:
        plain = save_tiny_model(tmp_path / "plain", num_layers=4, **changes)
        packed = tmp_path / "packed"
        packed.mkdir()
        stored: dict[str, torch.Tensor] = {}
        for path in plain.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in list(tensors.items()):
                if not is_packed(name):
                    stored[name] = tensor
                    continue
                scale = tensor.abs().amax(dim=1, keepdim=True) / 127  # [rows, 1]
                quantised = (tensor / scale).round().to(torch.int8)
                stem = name.rpartition(".")[0]
                stored |= {f"{stem}.packed": quantised, f"{stem}.scale": scale, f"{stem}.input_scale": torch.ones(1)}
                tensors[name] = quantised.float() * scale
            save_file(tensors, path, metadata={"format": "pt"})
        save_file(stored, packed / "model.safetensors")
        config = json.loads((plain / "config.json").read_text())
        (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "rows"}}))
        return Pair(packed=packed, plain=plain)

    return make


def text_of(folder: Path, device: str = "cpu", **changes: Any) -> tuple[list[int], dict[str, Any]]:
    settings: dict[str, Any] = {"model": str(folder), "device": "cpu", "tree": "none", **changes}
    with open_engine(EngineSettings(**settings), hardware=L40, device=DEVICES[device]()) as engine:
        result = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        return list(result.token_ids), result.to_json()


@pytest.mark.matrix
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_streamed_resident_and_read_from_disk_it_writes_the_text_of_the_unpacked_model(
    pack: Callable[..., Pair], device: str
) -> None:
    pair = pack()
    expected, _ = text_of(pair.plain)
    for places in ({"resident_layers": 0}, {"resident_layers": 2}, {"resident_layers": 4}, {"host_memory_bytes": 40_000}):
        found, document = text_of(pair.packed, device, **{"resident_layers": 0, **places})
        assert found == expected
        assert document["environment"]["weights"] == "bytes by rows"
        streamed = document["streaming"]["streamed_layers"]
        assert document["streaming"]["codecs"] == ({"rows": streamed} if streamed else {})
        assert document["streaming"]["bytes_per_pass"] * 2 < document["streaming"]["raw_bytes_per_pass"] or not streamed


@pytest.mark.parametrize("num_resident", [1, 4])
def test_layers_that_the_device_keeps_packed_are_the_same(
    pack: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, num_resident: int
) -> None:
    pair = pack()
    expected, _ = text_of(pair.plain)

    def keeping(*arguments: Any, **named: Any) -> MemoryPlan:
        memory = plan_memory(*arguments, **named)
        return replace(memory, placement=replace(memory.placement, coded=memory.placement.resident))

    monkeypatch.setattr("offload.planner.workload.plan_memory", keeping)
    assert text_of(pair.packed, resident_layers=num_resident)[0] == expected


def test_a_tree_over_packed_weights_and_a_packed_draft_change_no_token(pack: Callable[..., Pair]) -> None:
    pair = pack()
    found, document = text_of(pair.packed, draft_models=(str(pair.packed),), tree="2x3:kary", resident_layers=1)
    assert found == text_of(pair.plain)[0]
    assert document["speculation"]["tokens_per_pass"] > 2  # it drafts what the target says


def test_embedding_and_head_may_be_packed_too(pack: Callable[..., Pair]) -> None:
    pair = pack(lambda name: name.endswith("weight") and "norm" not in name)
    assert text_of(pair.packed)[0] == text_of(pair.plain)[0]


def test_what_lies_beside_packed_weights_and_is_not_used_is_no_stranger(
    pack: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_source(str(pack().packed), "--model", "float32", "cpu")
    assert "no place for" not in caplog.text


def change(folder: Path, changed: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda tensors: tensors.pop(f"{Q}.scale"), "has no scale beside it"),
        (lambda tensors: tensors.__setitem__(f"{Q}.packed", torch.zeros(3, 3, dtype=torch.int8)), "has bytes of shape (3, 3)"),
        (lambda tensors: tensors[f"{Q}.scale"].fill_(torch.nan), "not finite"),
        (lambda tensors: tensors[f"{Q}.scale"][:1].fill_(torch.inf), "not finite"),
    ],
)
def test_packed_weights_that_are_damaged_are_refused_before_any_memory_is_taken(
    pack: Callable[..., Pair], changed: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    folder, device = pack().packed, WatchedDevice()
    change(folder, changed)
    with pytest.raises(OffloadError, match=re.escape(says)) as error:
        open_engine(EngineSettings(model=str(folder), device="cpu", tree="none"), hardware=L40, device=device)
    assert isinstance(error.value, CheckpointError) and error.value.exit_code == ModelError.exit_code
    assert error.value.where == str(folder) and len(str(error.value).splitlines()) == 3
    assert not {"alloc", "pin", "copy"}.intersection(device.calls)


def test_all_scales_that_are_not_finite_are_named_at_once(pack: Callable[..., Pair]) -> None:
    folder = pack().packed
    change(folder, lambda tensors: [tensors[f"model.layers.{layer}.mlp.up_proj.scale"].fill_(torch.nan) for layer in (0, 3)])
    with pytest.raises(CheckpointError) as error:
        check_source(str(folder), "--model", "float32", "cpu")
    assert "2 problems" in error.value.what and all(f"layers.{layer}.mlp" in error.value.what for layer in (0, 3))


@pytest.mark.parametrize("method", ["", "aqlm", 7, None, {"a": 1}, "x" * 10_000])
def test_a_method_that_nobody_knows_is_named_with_those_that_we_do(tmp_path: Path, method: object) -> None:
    folder = save_tiny_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method, "bits": 2}}))
    with pytest.raises(ModelError) as error:
        check_source(str(folder), "--model", "float32", "cpu")
    assert str(method)[:40] in error.value.what and "quantised by one of" in error.value.cure
    assert len(str(error.value)) < 1000
