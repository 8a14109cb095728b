"""A model's chat template, applied to messages: in a sandbox, in a process of its own, with bounds on time, memory and size."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ModelError

LIMIT_S = 2  # of CPU time; templates take milliseconds
LIMIT_WALL_S = 30.0  # on a machine too busy to give two seconds of CPU
LIMIT_BYTES = 2**30
LIMIT_CHARACTERS = 16 * 2**20
_PROCESS = Path(__file__).with_name("template_process.py")


def apply_template(
    template: str, messages: Sequence[Mapping[str, str]], values: Mapping[str, object], *, limit_s: int = LIMIT_S
) -> str:
    """The text of `messages` ({"role", "content"} each) and the opening of an answer. `values` are what else a template may
    use by name, such as bos_token or enable_thinking: what JSON can hold.

    Raises ModelError for a template that fails, exceeds its bounds, or refuses these messages.
    """
    context = {**values, "messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
    limits = {"limit_s": limit_s, "limit_bytes": LIMIT_BYTES, "limit_characters": LIMIT_CHARACTERS}
    command = [sys.executable, "-I", str(_PROCESS)]
    try:
        ran = subprocess.run(
            command,
            input=json.dumps({"template": template, "context": context, **limits}).encode(),
            capture_output=True,
            timeout=LIMIT_WALL_S,
            start_new_session=True,  # Ctrl-C in a terminal is for us
        )
    except subprocess.TimeoutExpired:
        raise _failed(f"it did not finish in {LIMIT_WALL_S:.0f} s") from None
    if ran.returncode:
        last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _failed(f"it did not finish in {limit_s} s" if ran.returncode < 0 else last[:300])
    answer = json.loads(ran.stdout)
    if "failed" in answer:
        raise _failed(answer["failed"][:300])
    return str(answer["text"])


def _failed(reason: str) -> ModelError:
    return ModelError(
        f"the chat template failed: {' '.join(reason.split())}", where="chat template of the model", cure="use --raw"
    )
