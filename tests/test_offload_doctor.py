"""`doctor`: every fault has its line, its status and its cure; gathering works on whatever machine this is."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from command_line import DOES_NOT_FIT, INVALID, assert_usage_error, run_command
from offload.demo import DRAFT, TARGET
from offload.device import numa
from offload.device.cpu import CpuDevice
from offload.doctor import gather, model_checks, nvml
from offload.doctor.facts import (
    Check,
    CopyFacts,
    DecodeFacts,
    DiskFacts,
    Facts,
    GpuActivity,
    GpuFacts,
    Holder,
    HostFacts,
    Need,
    need_of,
)
from offload.doctor.judge import Finding, exit_code, judge, worst_status
from offload.errors import FitError
from offload.planner.cost import GIB
from offload.planner.shapes import find_shape
from offload.source import check_source
from offload.weights.checkpoint import open_checkpoint
from packed_models import write_packed

ROOT = Path(__file__).resolve().parent.parent
HOST = HostFacts(
    kernel="6.8.0-45-generic",
    available_bytes=200 * GIB,
    cgroup_limit_bytes=None,
    memlock_bytes=None,
    nodes=frozenset({0}),
    own_nodes=frozenset({0}),
    versions={"python": "3.12.1", "torch": "2.11.0", "transformers": "5.17.0"},
)
ACTIVITY = GpuActivity(link_generation=4, link_width=16, sm_clock_mhz=2520, slowdowns=(), under_load=True)
GPU = GpuFacts(
    name="NVIDIA GeForce RTX 4090",
    driver="580.65",
    total_bytes=24 * GIB,
    free_bytes=23 * GIB + GIB // 2,
    holders=(),
    max_generation=4,
    max_width=16,
    card_generation=4,
    max_sm_clock_mhz=2520,
    numa_node=0,
    activity=ACTIVITY,
)
COPIES = CopyFacts(tried_bytes=8 * GIB, pinned_bytes=8 * GIB, register_s=0.9, bytes_per_s=26.3e9)
NEED = Need(host_bytes=128 * GIB, least_host_bytes=4 * GIB, least_device_bytes=6 * GIB)
SLOW_DECODING = DecodeFacts(weights="GGUF Q4_K", stored_bytes=502_000_000, layer_s=0.04)
DISK = DiskFacts(read_bytes=4 * GIB, read_s=1.5, total_bytes=128 * GIB, is_direct=True)
HEALTHY = Facts(
    device="auto",
    host=HOST,
    gpu=GPU,
    gpu_usable=True,
    cuda_version="13.0",
    copies=COPIES,
    need=NEED,
    disk=DISK,
    checks=(Check(name="model", value="llama, 80 layers"), Check(name="vocabulary", value="32000 tokens")),
)


def found(facts: Facts, name: str) -> Finding:
    return next(finding for finding in judge(facts) if finding.name == name)


def only_fault(facts: Facts) -> Finding:
    """The one finding that is not ok."""
    (finding,) = [finding for finding in judge(facts) if finding.status != "ok"]
    return finding


def with_host(**changes: object) -> Facts:
    return replace(HEALTHY, host=replace(HOST, **changes))


def with_gpu(**changes: object) -> Facts:
    return replace(HEALTHY, gpu=replace(GPU, **changes))


def test_a_decoder_that_is_faster_than_the_link_is_said_to_be() -> None:
    facts = replace(HEALTHY, decoding=replace(SLOW_DECODING, layer_s=0.001))
    assert found(facts, "decoder") == Finding(
        name="decoder", status="ok", value="GGUF Q4_K: 1 ms a layer, 19.1 ms over the link"
    )
    assert "decoder" not in [finding.name for finding in judge(replace(facts, copies=None))], "nothing to compare it with"


def test_a_healthy_machine_has_nothing_to_cure() -> None:
    findings = judge(HEALTHY)
    assert {finding.status for finding in findings} == {"ok"} and {finding.cure for finding in findings} == {None}
    assert (worst_status(findings), exit_code(findings)) == ("ok", 0)
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) and {"GPU", "PCIe", "pinned", "cgroup", "NUMA", "VRAM", "disk", "model"} <= set(names)
    assert found(HEALTHY, "pinned").value == "registered 8.00 GiB of 128.0 GiB needed in 0.9 s (test)"


@pytest.mark.parametrize(
    "facts, name, value, cure",
    [
        (with_host(kernel="5.15.167.4-microsoft-standard-WSL2"), "system", "WSL", "run on Linux itself"),
        (with_host(cgroup_limit_bytes=96 * GIB), "cgroup", "96.0 GiB < 128.0 GiB", "docker run --memory 130g"),
        (with_host(available_bytes=100 * GIB), "host memory", "100.0 GiB available, 128.0 GiB needed", "28.0 GiB more"),
        (with_gpu(activity=replace(ACTIVITY, slowdowns=("power brake",))), "clocks", "power brake", "power supply"),
        (replace(HEALTHY, disk=replace(DISK, read_s=20.0)), "disk", "0.2 GB/s", "NVMe"),
        (replace(HEALTHY, copies=replace(COPIES, bytes_per_s=9e9)), "PCIe", "29% of the wire's rate", "NUMA"),
        (replace(HEALTHY, decoding=SLOW_DECODING), "decoder", "Q4_K: 40 ms a layer, 19.1 ms over the link", "passes wait"),
        (replace(HEALTHY, gpu=None, copies=None), "GPU", "CPU device", "nvidia-smi"),
        (replace(HEALTHY, gpu_usable=False, cuda_version=None, copies=None), "GPU", "without CUDA", "pytorch.org"),
        (replace(HEALTHY, gpu_usable=False, copies=None), "GPU", "with driver 580.65", "CUDA_VISIBLE_DEVICES"),
        (replace(HEALTHY, checks=(Check(name="tokenizer", value="none", cure="copy it"),)), "tokenizer", "none", "copy it"),
    ],
)
def test_what_makes_a_run_slow_is_one_warning(facts: Facts, name: str, value: str, cure: str) -> None:
    finding = only_fault(facts)
    assert (finding.name, finding.status) == (name, "warn") and finding.cure is not None
    assert value in finding.value and cure in finding.cure and exit_code(judge(facts)) == 0


def test_a_link_that_is_slower_than_the_card_is_told_from_a_slot_that_is() -> None:
    """gen3 x8 under load: trained down where card and slot could do gen4 x16, or all that the slot offers."""
    narrow = replace(ACTIVITY, link_generation=3, link_width=8)
    trained = only_fault(replace(HEALTHY, gpu=replace(GPU, activity=narrow), copies=replace(COPIES, bytes_per_s=6.5e9)))
    assert trained.value == "gen3 x8 under load, measured 6.5 GB/s; the card can do gen4 x16"
    assert trained.cure is not None and "riser" in trained.cure
    slot = only_fault(with_gpu(activity=replace(ACTIVITY, link_generation=3), max_generation=3))
    assert slot.cure is not None and "the slot ends at gen3" in slot.cure


def test_an_idle_link_is_not_held_against_the_card() -> None:
    idle = replace(ACTIVITY, link_generation=1, under_load=False)
    assert found(replace(HEALTHY, gpu=replace(GPU, activity=idle), copies=None), "PCIe").status == "ok"
    silent = replace(ACTIVITY, link_generation=None, link_width=None)
    assert found(with_gpu(activity=silent), "PCIe").value == "the driver does not tell, measured 26.3 GB/s"


def test_memory_held_by_others_is_named_and_fails_only_where_the_model_no_longer_fits() -> None:
    holders = (Holder(pid=4711, name="python3", num_bytes=12 * GIB), Holder(pid=12, name="Xorg", num_bytes=None))
    warned = only_fault(with_gpu(holders=holders, free_bytes=11 * GIB))
    assert warned.status == "warn" and "python3 (pid 4711, 12.0 GiB), Xorg (pid 12)" in warned.value
    failed = with_gpu(holders=holders, free_bytes=5 * GIB)
    assert only_fault(failed).cure == "end the processes that hold it" and exit_code(judge(failed)) == DOES_NOT_FIT
    never = replace(HEALTHY, need=replace(NEED, least_device_bytes=30 * GIB))
    assert "larger GPU" in str(only_fault(never).cure) and exit_code(judge(never)) == DOES_NOT_FIT
    assert found(replace(never, gpu_usable=False), "VRAM").status == "ok"  # what runs on the CPU device needs none of it


@pytest.mark.parametrize(
    "gpu_node, own_nodes, value",
    [(1, {0}, "is remote"), (0, {0, 1}, "may be remote"), (1, {1}, None), (None, {0, 1}, None)],
)
def test_a_gpu_on_another_numa_node_is_a_warning(gpu_node: int | None, own_nodes: set[int], value: str | None) -> None:
    host = replace(HOST, nodes=frozenset({0, 1}), own_nodes=frozenset(own_nodes))
    finding = found(replace(HEALTHY, host=host, gpu=replace(GPU, numa_node=gpu_node)), "NUMA")
    assert finding.status == ("ok" if value is None else "warn")
    assert value is None or (value in finding.value and f"--cpunodebind={gpu_node}" in str(finding.cure))


def test_memlock_counts_only_where_a_registration_was_refused() -> None:
    limited = with_host(memlock_bytes=8 * 2**20)
    assert found(limited, "memlock").status == "ok"
    refused = replace(limited, copies=replace(COPIES, pinned_bytes=2 * GIB))
    faults = {finding.name: finding for finding in judge(refused) if finding.status != "ok"}
    assert set(faults) == {"pinned", "memlock"} and faults["memlock"].cure == "ulimit -l unlimited"
    assert "registered 2.00 GiB of 8.00 GiB tried" in faults["pinned"].value
    for enough in (None, 64 * GIB):  # then something else refused
        host = replace(HOST, memlock_bytes=enough)
        assert found(replace(HEALTHY, host=host, copies=replace(COPIES, pinned_bytes=0)), "memlock").status == "ok"


def test_failures_end_with_the_code_of_the_worst() -> None:
    bad_model = Check(name="draft", value="vocab 32016 != 32000", cure="another draft", exit_code=INVALID)
    no_room = replace(NEED, least_host_bytes=300 * GIB)
    assert exit_code(judge(replace(HEALTHY, checks=(bad_model,)))) == INVALID
    assert exit_code(judge(replace(HEALTHY, need=no_room))) == DOES_NOT_FIT
    assert exit_code(judge(replace(HEALTHY, need=no_room, checks=(bad_model,)))) == INVALID
    assert exit_code(judge(replace(HEALTHY, device="cuda", gpu=None, copies=None))) == DOES_NOT_FIT
    assert exit_code(judge(with_host(versions={"torch": "2.11", "transformers": None}))) == INVALID
    assert worst_status(judge(replace(HEALTHY, checks=(bad_model,)))) == "fail"


def test_releases_that_were_not_tested_are_warned_of() -> None:
    finding = judge(with_host(untested=("torch 3.0 (tested: >=2.6,<2.14)",)))[0]
    assert (finding.name, finding.status) == ("versions", "warn")
    assert finding.value.endswith("; untested: torch 3.0 (tested: >=2.6,<2.14)") and "constraints.txt" in str(finding.cure)


def test_a_line_is_status_name_value_and_cure() -> None:
    finding = Finding(name="cgroup", status="fail", value="too small", cure="raise it", exit_code=4)
    assert finding.line().split() == ["FAIL", "cgroup", "too", "small", "->", "raise", "it"]
    assert finding.to_json() == {"name": "cgroup", "status": "fail", "value": "too small", "cure": "raise it"}
    assert "->" not in Finding(name="cgroup", status="ok", value="no limit").line()


def test_a_pair_needs_its_layers_on_the_host_and_two_of_them_with_the_draft_on_the_device() -> None:
    target, draft = find_shape("llama-2-70b", "").cost(2), find_shape("llama-2-7b", "").cost(2)
    need = need_of(target, draft, on_gpu=True)
    assert need.host_bytes == target.stored_bytes and need.least_host_bytes == 2 * target.slot_bytes
    assert (
        need.least_device_bytes
        == 2 * target.slot_bytes + target.outside_bytes + 2 * find_shape("llama-2-7b", "").num_parameters
    )
    on_cpu = need_of(target, draft, on_gpu=False)
    assert on_cpu.host_bytes == need.host_bytes + need.least_device_bytes


class FakeNvml:
    """A driver with one GPU: gen3 x8 of gen4 x16, slowed down by heat, with two other processes and ours on it.
    `silent` names what it does not answer."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1

    def __init__(self, *silent: str) -> None:
        self.silent, self.is_open = silent, False
        others = [SimpleNamespace(pid=4711, usedGpuMemory=12 * GIB), SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB)]
        self._answers: dict[str, object] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "gpu",
            "nvmlDeviceGetHandleByIndex": "gpu",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, free=11 * GIB),
            "nvmlDeviceGetName": "RTX 4090",
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:4A:00.0"),
            "nvmlSystemGetDriverVersion": "580.65",
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetGpuMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetMaxClockInfo": 2520,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40 | 0x04,
            "nvmlDeviceGetCurrPcieLinkGeneration": 3,
            "nvmlDeviceGetCurrPcieLinkWidth": 8,
            "nvmlDeviceGetClockInfo": 1200,
            "nvmlDeviceGetComputeRunningProcesses": others,
            "nvmlDeviceGetGraphicsRunningProcesses": [SimpleNamespace(pid=12, usedGpuMemory=None)],
            "nvmlSystemGetProcessName": "/usr/bin/python3",
        }

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name == "nvmlShutdown":
            return lambda: setattr(self, "is_open", False)

        def answer(*arguments: object) -> object:
            if name in self.silent:
                raise FakeNvml.NVMLError(name)
            self.is_open = True
            return self._answers[name]

        return answer


def test_the_driver_is_asked_for_link_clocks_memory_and_its_holders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
    (tmp_path / "0000:4a:00.0").mkdir()
    (tmp_path / "0000:4a:00.0" / "numa_node").write_text("1\n")
    driver = FakeNvml()
    gpu = nvml.read_gpu(driver, nvml.find_gpu(driver, "GPU-1"))
    assert gpu is not None
    assert (gpu.name, gpu.driver, gpu.total_bytes, gpu.free_bytes) == ("RTX 4090", "580.65", 24 * GIB, 11 * GIB)
    assert (gpu.max_generation, gpu.max_width, gpu.card_generation, gpu.numa_node) == (4, 16, 4, 1)
    assert gpu.holders == (
        Holder(pid=4711, name="python3", num_bytes=12 * GIB),
        Holder(pid=12, name="python3", num_bytes=None),
    )
    activity = nvml.read_activity(driver, "gpu", under_load=True)
    assert activity == GpuActivity(
        link_generation=3, link_width=8, sm_clock_mhz=1200, slowdowns=("hardware thermal limit",), under_load=True
    )
    (tmp_path / "0000:4a:00.0" / "numa_node").write_text("-1\n")
    gpu = nvml.read_gpu(driver, "gpu")
    assert gpu is not None and gpu.numa_node is None


def test_what_the_driver_does_not_answer_is_unknown() -> None:
    driver = FakeNvml(*(name for name in FakeNvml()._answers if name != "nvmlDeviceGetMemoryInfo"))
    assert nvml.find_gpu(driver, None) is None and nvml.find_gpu(driver, "GPU-1") is None
    assert nvml.read_gpu(FakeNvml("nvmlDeviceGetMemoryInfo"), "gpu") is None
    gpu = nvml.read_gpu(driver, "gpu")
    assert gpu is not None
    assert (gpu.driver, gpu.holders, gpu.max_generation, gpu.numa_node) == ("unknown", (), None, None)
    statuses = {finding.name: finding.status for finding in judge(replace(HEALTHY, gpu=gpu))}
    assert {name: status for name, status in statuses.items() if status != "ok"} == {"VRAM": "warn"}


def test_the_driver_is_left_after_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeNvml()
    monkeypatch.setattr("pynvml.nvmlInit", driver.nvmlInit)
    monkeypatch.setattr("pynvml.nvmlShutdown", driver.nvmlShutdown)
    with pytest.raises(RuntimeError), nvml.open_nvml() as opened:
        assert opened is not None and driver.is_open
        raise RuntimeError
    assert not driver.is_open


def test_copies_are_timed_while_the_card_is_looked_at() -> None:
    device = CpuDevice(200e6)
    looks: list[int] = []
    copies = gather.time_copies(device, 2**20 + 4096, lambda: looks.append(1))
    device.close()
    assert looks == [1] and copies.tried_bytes == 2**20 + 4096
    assert 20e6 < copies.bytes_per_s <= 210e6  # the link that was emulated, and what a busy machine leaves of it
    assert copies.pinned_bytes == 0  # nothing is registered on the CPU device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine whose driver tells of one GPU, which torch can use; copies go to a CPU device."""
    driver = FakeNvml()
    monkeypatch.setattr(gather, "open_nvml", lambda: nullcontext(driver))
    monkeypatch.setattr(gather, "open_device", lambda name: CpuDevice())
    monkeypatch.setattr(gather.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gather.cuda, "uuid", lambda index: f"GPU-{index}")
    monkeypatch.setattr(gather, "PIN_TEST_BYTES", 2**20)
    return driver


def test_a_gpu_is_looked_at_under_load(one_gpu: FakeNvml) -> None:
    facts = gather.gather_facts(model=None, draft_model=None, device="auto")
    assert facts.gpu is not None and facts.gpu.activity.under_load and facts.copies is not None
    assert facts.copies.tried_bytes == 2**20
    assert (found(facts, "GPU").status, found(facts, "PCIe").status) == ("ok", "warn")
    facts = gather.gather_facts(model=None, draft_model=None, device="cpu")
    assert facts.gpu is None and facts.copies is None


def test_a_gpu_without_room_for_the_test_is_described_all_the_same(one_gpu: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CpuDevice, num_bytes: int) -> None:
        raise FitError("no room", where="device", cure="none")

    monkeypatch.setattr(CpuDevice, "alloc", refuse)
    facts = gather.gather_facts(model=None, draft_model=None, device="cuda:0")
    assert facts.copies is None and facts.gpu is not None and not facts.gpu.activity.under_load


def test_a_gpu_of_which_the_driver_tells_nothing_is_still_used(one_gpu: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "open_nvml", lambda: nullcontext(None))
    facts = gather.gather_facts(model=None, draft_model=None, device="auto")
    assert facts.gpu is not None and facts.gpu.driver == "unknown" and facts.copies is not None
    assert found(facts, "PCIe").value.startswith("the driver does not tell, measured")


def test_a_gpu_that_torch_cannot_use_is_seen(one_gpu: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather.cuda, "is_available", lambda: False)
    facts = gather.gather_facts(model=None, draft_model=None, device="auto")
    assert facts.gpu is not None and facts.copies is None and found(facts, "GPU").status == "warn"


def test_gathering_on_this_machine_agrees_with_the_system() -> None:
    facts = gather.gather_facts(model=None, draft_model=None, device="cpu")
    assert (facts.gpu, facts.copies, facts.need, facts.disk, facts.checks) == (None, None, None, None, ())
    host = facts.host
    assert host.kernel == os.uname().release and host.available_bytes > 0 and host.own_nodes <= host.nodes
    assert all(host.versions.values()) and host.versions["python"] is not None
    assert found(facts, "GPU").status == "ok"


def test_nodes_are_those_of_the_cpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, cpus in {"node0": "0-3,8", "node1": "4-7", "node2": ""}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(f"{cpus}\n")
    monkeypatch.setattr(numa, "NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 8})
    assert (gather.gather_host().nodes, gather.gather_host().own_nodes) == ({0, 1, 2}, {0, 1})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {6})
    assert gather.gather_host().own_nodes == {1}


def test_the_disk_is_read_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(TARGET)
    whole = model_checks.time_disk(checkpoint, limit_s=60)
    assert whole.read_bytes == whole.total_bytes == checkpoint.num_bytes and whole.read_s > 0
    assert 0 < model_checks.time_disk(checkpoint, limit_s=0).read_bytes < checkpoint.num_bytes
    monkeypatch.setattr(model_checks, "DISK_TEST_BYTES", 2**20)
    assert 2**20 <= model_checks.time_disk(checkpoint, limit_s=60).read_bytes < checkpoint.num_bytes


def test_the_demo_pair_passes(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_command(capsys, "doctor", "--model", TARGET, "--draft-model", DRAFT, "--device", "cpu", "--json")
    document = json.loads(ran.stdout)
    names = {finding["name"]: finding["status"] for finding in document["findings"]}
    assert ran.code == 0 and document["schema_version"] == 1 and document["status"] in ("ok", "warn")
    assert {names[name] for name in ("model", "tokenizer", "draft", "draft tokens", "vocabulary", "disk")} == {"ok"}
    assert all(set(finding) == {"name", "status", "value", "cure"} for finding in document["findings"])


def test_presets_are_sized_without_their_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """A layer of a small model fits anywhere; a 70B in float32 says what it needs."""
    ran = run_command(capsys, "doctor", "--model", "scale:llama-3-8b:1", "--device", "cpu", "--quiet")
    assert (ran.code, ran.stderr) == (0, "") and "by its shape" in ran.stdout
    facts = gather.gather_facts(model="llama-2-70b", draft_model="llama-68m", device="cpu")
    target, draft = find_shape("llama-2-70b", "").cost(4), find_shape("llama-68m", "").cost(4)
    assert facts.need == need_of(target, draft, on_gpu=False)
    assert found(facts, "vocabulary").status == "ok"
    other = gather.gather_facts(model="qwen2.5-72b", draft_model="qwen2.5-0.5b", device="cpu")
    assert found(other, "vocabulary").status == "warn"  # padded differently, or another tokenizer: shapes cannot tell


@pytest.mark.parametrize(
    "name", ["no/such/folder", "scale:llama-2-71b", "scale:llama-2-70b:0", "scale:llama-2-70b:many", "scale:llama-68m", ""]
)
def test_a_model_that_is_nowhere_is_a_failed_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_command(capsys, "doctor", "--model", name, "--device", "cpu")
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("FAIL")]
    assert ran.code == INVALID and line.split()[1] == "model" and "->" in line


def test_a_shard_that_is_missing_is_a_failed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in TARGET.iterdir():
        if "00003" not in path.name:
            (tmp_path / path.name).symlink_to(path.resolve())
    ran = run_command(capsys, "doctor", "--model", tmp_path, "--device", "cpu")
    assert ran.code == INVALID and "1 of 4 files are missing: model-00003-of-00004.safetensors" in ran.stdout


def test_a_draft_of_another_vocabulary_is_a_failed_line(
    models: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = (models(), models(vocab_size=98))
    ran = run_command(capsys, "doctor", "--model", pair[0], "--draft-model", pair[1], "--device", "cpu")
    assert ran.code == INVALID and "the draft's vocabulary has 98 tokens, the target's 97" in ran.stdout
    assert "none in the model's folder" in ran.stdout  # neither has a tokenizer, which is a warning


def test_a_tokenizer_that_numbers_more_tokens_than_the_embedding_has_is_a_failed_line(
    tmp_path: Path, models: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [*models().iterdir(), TARGET / "tokenizer.json", TARGET / "tokenizer_config.json"]:
        (tmp_path / path.name).symlink_to(path.resolve())
    ran = run_command(capsys, "doctor", "--model", tmp_path, "--device", "cpu")
    assert ran.code == INVALID and "numbers 4096 tokens, the model's embedding has 97" in ran.stdout
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    ran = run_command(capsys, "doctor", "--model", tmp_path, "--device", "cpu")
    assert ran.code == INVALID and "the tokenizer cannot be read" in ran.stdout


def test_flags_are_checked_before_torch_is_imported() -> None:
    code = (
        "from sys import modules; from offload.cli.main import main; code = main(['doctor', '--device', 'tpu']);"
        "print(code, sorted({'torch', 'transformers'} & set(modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "2 []"


@pytest.mark.parametrize(
    "flags", [["--device", "tpu"], ["--device", "cuda:x"], ["--modle", "x"], ["--model"], ["extra"], ["--quiet", "--verbose"]]
)
def test_bad_flags_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert_usage_error(run_command(capsys, "doctor", *flags))


def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_failed_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.device.cuda.is_available", lambda: False)
    monkeypatch.setattr(gather, "find_gpu", lambda nvml, uuid: None)
    ran = run_command(capsys, "doctor", "--device", "cuda")
    assert ran.code == DOES_NOT_FIT and ran.stdout.splitlines()[1].startswith("FAIL  GPU")


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("form", "name"), [("gptq-ordered", "GPTQ int4"), ("residual-int4", "16 bit, coded beside a base of int4")]
)
def test_a_packed_model_is_named_and_its_bytes_are_those_of_a_run(tmp_path: Path, form: str, name: str, on_gpu: bool) -> None:
    folder = str(write_packed(form, tmp_path).folder)
    inspected = model_checks.inspect_model(folder, "--model", "model", on_gpu=on_gpu)
    assert f"llama in {name}, 3 layers" in inspected.checks[0].value and inspected.checks[0].cure is None
    dtype = "bfloat16" if on_gpu else "float32"
    assert inspected.cost == check_source(folder, "--model", dtype, "cpu").model.cost
    assert inspected.cost is not None and inspected.cost.stored_bytes < 0.53 * inspected.cost.computed_bytes


def test_weights_packed_in_a_way_that_nobody_knows_fail_with_the_methods_that_we_do(tmp_path: Path) -> None:
    folder = write_packed("fp8", tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "aqlm"
    (folder / "config.json").write_text(json.dumps(config))
    (check,) = model_checks.inspect_model(str(folder), "--model", "model", on_gpu=False).checks
    assert "aqlm" in check.value and "compressed-tensors" in str(check.cure) and check.exit_code == INVALID
