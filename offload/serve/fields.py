"""Fields that would change the answer and are not supported: OpenAI's, and those of vLLM, SGLang, llama.cpp and others.

Beside each stand the values that ask for nothing. They are taken, and so is null. A field in no table has no effect and is
named in the answer's headers.
"""

import json
from collections.abc import Mapping

from .problems import Problem

Neutral = Mapping[str, tuple[object, ...]]

_SAMPLING: Neutral = {
    "adaptive_target": (-1,),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynamic_temperature": (False,),
    "dynatemp_range": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "frequency_penalty": (0,),
    "logit_bias": ({}, []),
    "min_keep": (0, 1),
    "min_p": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "no_repeat_ngram_size": (0,),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "random_seed": (),
    "rep_pen": (1,),
    "renormalize_logits": (False,),
    "repeat_penalty": (1,),
    "repetition_detection": (),
    "repetition_penalty": (1,),
    "sampler_priority": (),
    "samplers": (),
    "sequence_bias": ({}, []),
    "smoothing_factor": (0,),
    "temperature_last": (False,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical": (1, 0),
    "typical_p": (1, 0),
    "watermark": (False,),
    "watermarking": (False,),
    "xtc_probability": (0,),
}
_SEARCH: Neutral = {
    "best_of": (1,),
    "early_stopping": (False,),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "negative_prompt": ("",),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_beam_search": (False,),
}
_ALLOWED_TEXT: Neutral = {
    "allowed_token_ids": ([],),
    "allowed_tokens": ([],),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "ban_eos_token": (False,),
    "banned_strings": ([], ""),
    "banned_tokens": ([], ""),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "custom_token_bans": ([], ""),
    "ebnf": ("",),
    "force_words_ids": ([],),
    "format": ("",),
    "grammar": ("",),
    "grammar_string": ("",),
    "grammar_triggers": ([],),
    "guided_choice": ([],),
    "guided_decoding": (),
    "guided_grammar": ("",),
    "guided_json": ("",),
    "guided_json_object": (False,),
    "guided_regex": ("",),
    "json_schema": (),
    "logits_processors": ([],),
    "regex": ("",),
    "regex_pattern": ("",),
    "response_format": ({"type": "text"},),
    "structural_tag": ("",),
    "structured_outputs": ({},),
    "vllm_xargs": ({},),
}
_LENGTH: Neutral = {
    "include_stop_str_in_output": (False,),
    "max_length": (),
    "max_new_tokens": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "n_indent": (0,),
    "n_predict": (-1,),
    "no_stop_trim": (False,),
    "num_predict": (-1,),
    "stop_regex": ("", []),
    "stop_strings": ([],),
    "stopping_strings": ([],),
    "t_max_predict_ms": (0,),
    "truncate": (),
    "truncate_prompt_tokens": (),
}
_TOOLS_AND_MEDIA: Neutral = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image_data": ([],),
    "images": ([],),
    "modalities": (["text"],),
    "multimodal_data": ([],),
    "plugins": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
_REASONING: Neutral = {
    "enable_thinking": (),
    "include_reasoning": (True,),
    "prompt_mode": (),
    "reasoning": ({},),
    "reasoning_budget": (-1,),
    "reasoning_budget_tokens": (-1,),
    "reasoning_format": ("none", "auto"),
    "think": (),
    "thinking": (),
    "thinking_budget": (-1,),
    "thinking_budget_tokens": (-1,),
    "thinking_token_budget": (-1,),
    "verbosity": ("medium",),
}
_PROMPT: Neutral = {
    "chat_template": ("",),
    "documents": ([],),
    "extra_body": ({},),
    "input_embeds": ([],),
    "input_ids": ([],),
    "instruction_template": ("",),
    "instruction_template_str": ("",),
    "lora": ([],),
    "lora_path": ("",),
    "lora_request": (),
    "moderation": (),
    "options": ({},),
    "prompt_embeds": ([],),
    "safe_prompt": (False,),
    "session_params": ({},),
    "skip_special_tokens": (True,),
    "template": ("",),
    "transforms": ([],),
}
_REPORT: Neutral = {
    "logprob_token_ids": ([],),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "prompt_logprobs": (False,),
    "response_fields": ([],),
    "return_hidden_states": (False,),
    "return_prompt_text": (False,),
    "return_prompt_token_ids": (False,),
    "return_token_ids": (False,),
    "return_tokens": (False,),
    "return_tokens_as_token_ids": (False,),
}
_BOTH: Neutral = {
    **_SAMPLING,
    **_SEARCH,
    **_ALLOWED_TEXT,
    **_LENGTH,
    **_TOOLS_AND_MEDIA,
    **_REASONING,
    **_PROMPT,
    **_REPORT,
}
CHAT: Neutral = {
    **_BOTH,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "echo": (False,),
    "prompt": ("", []),
    "suffix": ("",),
}
COMPLETION: Neutral = {
    **_BOTH,
    "chat_template_kwargs": ({},),
    "messages": ([],),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "top_logprobs": (0,),
}
MESSAGE: Neutral = {
    "audio": (),
    "function_call": (),
    "images": ([],),
    "partial": (False,),
    "prefix": (False,),
    "tool_call_id": ("",),
    "tool_calls": ([],),
}
_HINTS = {
    "do_sample": "temperature 0 takes the most probable token",
    "enable_thinking": "give it in chat_template_kwargs",
    "extra_body": "its fields belong into the body itself, where the openai package puts them",
    "max_length": "give max_tokens",
    "max_new_tokens": "give max_tokens",
    "n_predict": "give max_tokens",
    "n_probs": "give logprobs",
    "num_predict": "give max_tokens",
    "options": "its fields belong into the body itself",
    "prompt_logprobs": "/v1/completions has echo with logprobs",
    "random_seed": "give seed",
    "reasoning": "give reasoning_effort",
    "stop_strings": "give stop",
    "stopping_strings": "give stop",
    "top_logprobs": "give their number as logprobs",
    "think": "give reasoning_effort or chat_template_kwargs",
    "thinking": "give reasoning_effort or chat_template_kwargs",
}


def without_effect(given: Mapping[str, object], unsupported: Neutral, place: str = "") -> tuple[str, ...]:
    """Names of the fields `given` that are in no table. Problem for one that would change the answer. `place` is where they
    stand, such as "messages.0."."""
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if name in unsupported and not any(_same(value, neutral) for neutral in unsupported[name]):
            raise Problem(400, "unsupported_parameter", f"{name} is not supported: {_cure(name, unsupported)}", place + name)
    return tuple(name for name in asked if name not in unsupported)


def _same(value: object, neutral: object) -> bool:
    """To Python, 0 is False: `prompt_logprobs` 0 asks for something."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _cure(name: str, unsupported: Neutral) -> str:
    neutral = unsupported[name]
    return _HINTS.get(name) or "leave it out" + (f", or send {json.dumps(neutral[0])}" if neutral else "")
