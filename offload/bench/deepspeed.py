"""DeepSpeed's ZeRO-Inference, written from its documentation (stage 3, parameters on the CPU).

It is the one baseline that prefetches weights as we do, so a comparison needs it. Tests check its configuration, and the reason
in its row where it cannot run. Running it takes a GPU and an installed deepspeed, which no test has."""

import os
from typing import Any

from ..model.transformers_api import build, watched_by_deepspeed
from ..source import ModelSource
from .materialise import host_tensors


def zero_config(variant: str, *, hidden_size: int, layer_parameters: int, dtype_name: str) -> dict[str, Any]:
    """`example` is what the project's own example sets: buckets of two hidden matrices, nothing pinned. `tuned` lets it
    prefetch a whole layer while three live, pins the parameters and keeps the norms on the device."""
    small = 2 * hidden_size * hidden_size
    return {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": dtype_name == "float16"},
        "bf16": {"enabled": dtype_name == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": layer_parameters if variant == "tuned" else small,
            "stage3_max_live_parameters": 3 * layer_parameters if variant == "tuned" else small,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 100_000 if variant == "tuned" else hidden_size,
            "offload_param": {"device": "cpu", "pin_memory": variant == "tuned"},
        },
    }


def open_deepspeed(variant: str, source: ModelSource) -> Any:
    """The engine's module, on the current GPU."""
    import deepspeed

    config = zero_config(
        variant,
        hidden_size=source.architecture.config.hidden_size,
        layer_parameters=max(codec.computed.num_bytes for codec in source.model.codecs) // source.model.dtype.itemsize,
        dtype_name=str(source.model.dtype).removeprefix("torch."),
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    os.environ.update(alone)
    deepspeed.init_distributed("nccl")
    keep_alive = watched_by_deepspeed(config)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model: Any = build(source.architecture.config, "sdpa", source.model.dtype)
    tensors = host_tensors(source)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(tensors.pop(name))
    engine = deepspeed.initialize(model=model, config_params=config)[0]
    engine.module.eval()
    engine.module.treestream_keep_alive = keep_alive  # transformers holds it by a weak reference
    return engine.module
