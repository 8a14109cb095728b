"""Streaming by the numbers, on the CPU device: is the link always busy, how much memory is held, how fast is loading?

    python tests/bench_streaming.py --folder /tmp/streaming_benchmark

Writes a random Llama of about 1.3 GB there (once), then prints one JSON object: link utilisation over 20 decode passes over
an emulated link, plain and with a tree; host bytes held per weight byte; loading against `dd iflag=direct` on the same
files, alternating. Medians of `--runs` runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.report.report import environment
from offload.weights.checkpoint import open_checkpoint
from offload.weights.layout import LayerLayout
from offload.weights.reader import ReadJob, TensorReader

PASSES = 20
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 8}
LINK = 800e6  # 67 MB a layer: 84 ms on this link, against a few ms of compute for a token


def make_model(folder: Path) -> None:
    if (folder / "target").exists():
        return
    torch.manual_seed(0)
    common = {"vocab_size": 512, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**SHAPE, **common)).save_pretrained(folder / "target", max_shard_size="300MB")
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**small, **common)).save_pretrained(folder / "draft")


def utilisation(folder: Path, tree: str, slots: int) -> dict[str, object]:
    draft = (str(folder / "draft"),) if tree != "none" else ()
    settings = EngineSettings(
        model=str(folder / "target"),
        draft_models=draft,
        tree=tree,
        device="cpu",
        slots=slots,
        resident_layers=0,
        emulate_link_bytes_per_s=LINK,
    )
    with open_engine(settings) as engine:
        steps = engine.stream([1, 2, 3], max_new_tokens=400, ignore_eos=True)
        for _ in range(PASSES + 1):
            next(steps)
        report = steps.result()
        memory = engine.memory()
    decode = report.stats.passes[1:]
    return {
        "tree": tree,
        "slots": slots,
        "passes": len(decode),
        "link_utilisation": report.link_utilisation,
        "median_pass_s": report.stats.median_pass_s,
        "floor_pass_s": report.plan.bytes_per_pass / LINK,
        "stall_share_of_pass": sum(one.stall_s for one in decode) / sum(one.round_s for one in decode),
        "host_bytes_per_weight_byte": memory.host_weights_bytes / report.plan.bytes_per_pass,
    }


def resident_set_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def loading_peak(folder: Path) -> dict[str, object]:
    """Peak resident memory of loading, beyond the weights, seen by a thread that looks every 2 ms."""
    settings = EngineSettings(model=str(folder / "target"), tree="none", device="cpu", resident_layers=0, slots=2)
    before, peak, done = resident_set_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_set_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open_engine(settings) as engine:
        weights = engine.memory().host_weights_bytes
    done.set()
    watcher.join()
    return {"weight_bytes": weights, "peak_beyond_weights_bytes": peak - before - weights, "limit_bytes": 256 * 2**20}


def load_rate(folder: Path) -> float:
    checkpoint = open_checkpoint(folder / "target")
    layout = LayerLayout.pack([(name, info.shape, torch.float32) for name, info in checkpoint.tensors.items()])
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)  # touched: the clock is for the disk
    jobs = [ReadJob(tensor=checkpoint.tensors[name], destination=view) for name, view in layout.views(buffer).items()]
    with TensorReader(checkpoint) as reader:
        start_s = time.monotonic()
        reader.read(jobs)
        return checkpoint.num_bytes / (time.monotonic() - start_s)


def dd_rate(folder: Path) -> float:
    files = sorted((folder / "target").glob("*.safetensors"))
    start_s = time.monotonic()
    for path in files:
        command = ["dd", f"if={path}", "of=/dev/null", "bs=16M", "iflag=direct"]
        subprocess.run(command, check=True, capture_output=True)
    return sum(path.stat().st_size for path in files) / (time.monotonic() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    make_model(arguments.folder)
    memory = loading_peak(arguments.folder)
    rates = [(load_rate(arguments.folder), dd_rate(arguments.folder)) for _ in range(arguments.runs)]
    result = {
        "environment": environment("cpu"),
        "emulated_link_bytes_per_s": LINK,
        "utilisation": [utilisation(arguments.folder, *case) for case in (("none", 2), ("none", 3), ("4x6:kary", 3))],
        "loading_memory": memory,
        "load_bytes_per_s": statistics.median(load for load, _ in rates),
        "dd_direct_bytes_per_s": statistics.median(dd for _, dd in rates),
        "load_over_dd": statistics.median(load / dd for load, dd in rates),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
