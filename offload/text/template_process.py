"""One chat template, rendered in a process of its own: a JSON object on stdin, one on stdout. Run by template.py; imports
nothing of ours, so it starts in a tenth of a second.

A template is a program that comes with a model. jinja's sandbox keeps it from files and from Python's internals; the limits
set here end one that loops or grows, which no sandbox within a process can.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class GenerationTag(Extension):
    """`{% generation %}` marks answers for training; here its body is rendered like any other."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way of declaring them)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class PlainNamespace(Namespace):
    """Without names that begin with an underscore, through which older escapes from the sandbox went."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise TemplateError(f"a namespace takes no name such as {name}")
        super().__setitem__(name, value)


def namespace(*pairs: Any, **values: Any) -> PlainNamespace:
    made = PlainNamespace()
    for name, value in dict(*pairs, **values).items():
        made[name] = value
    return made


def refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, context: dict[str, Any]) -> str:
    """With the names and whitespace rules that chat templates are written for: those of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form), namespace=namespace
    )
    return environment.from_string(template).render(context)


def main() -> None:
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (job["limit_s"], job["limit_s"]))
    resource.setrlimit(resource.RLIMIT_AS, (job["limit_bytes"], job["limit_bytes"]))
    try:
        text = render(job["template"], job["context"])
        answer = {"text": text} if len(text) <= job["limit_characters"] else {"failed": f"it made {len(text)} characters"}
    except MemoryError:
        answer = {"failed": f"it took more than {job['limit_bytes']} bytes of memory"}
    except Exception as error:  # a template can raise anything
        answer = {"failed": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
