"""The process in which `pipeline.text.chat_template` renders templates: a line of JSON in, a line out.

A template is a program by a model's or a recipe's author. Jinja's sandbox keeps it from files and code, not from
looping for ever or filling the memory: one `"%1000000000d" % 1` is a single step of C. Here the kernel ends what
takes more than argv[1] seconds of CPU time, and refuses memory. The environment of chat templates is that of
transformers' `apply_chat_template`; in a recipe's text every variable must be there, and no white space is dropped.
"""

import functools
import json
import os
import resource
import signal
import sys
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

_BYTES = 1 << 30
_CHARACTERS = 1 << 25


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what an assistant wrote, and changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    x: object, ensure_ascii: bool = False, indent: object = None, separators: object = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)  # type: ignore[arg-type]


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment(is_chat: bool) -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_chat,
        undefined=jinja2.Undefined if is_chat else jinja2.StrictUndefined,
        extensions=[_Generation, jinja2.ext.loopcontrols] if is_chat else [],
    )
    made.filters["tojson"] = _tojson
    if is_chat:
        made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return made


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for redpen, which goes on to end this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environments = {is_chat: _environment(is_chat) for is_chat in (True, False)}
    compiled = functools.lru_cache(8)(lambda template, is_chat: environments[is_chat].from_string(template))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        try:
            template, variables, is_chat = json.loads(line)
            if variables is None:
                environment = environments[is_chat]
                found = jinja2.meta.find_undeclared_variables(environment.parse(template))
                reply = json.dumps({"names": sorted(found - environment.globals.keys())})
            else:
                text = compiled(template, is_chat).render(variables)
                if len(text) > _CHARACTERS:
                    raise ValueError(f"it writes {len(text):,} characters, more than the {_CHARACTERS:,} allowed")
                reply = json.dumps({"text": text})
                del text
        except MemoryError:
            reply = json.dumps({"error": f"it needs more memory than the {_BYTES >> 30} GiB allowed"})
        except Exception as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:1000]}"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
