"""The process in which `pipeline.text.math_verify` runs math-verify: a line of JSON in, a line out.

It imports nothing of redpen. A comparison that takes more than argv[1] seconds of CPU time ends the process, by the
kernel: sympy may be deep in one multiplication of huge integers, where no Python handler would ever run.
"""

import json
import os
import resource
import signal
import sys

_BYTES = 4 << 30


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever sympy prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for redpen, which goes on to end this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        from math_verify import parse, verify
    except Exception as error:  # a broken installation may raise anything
        return reply(" ".join(f"{type(error).__name__}: {error}".split()))
    reply(None)
    for line in sys.stdin:
        given, wanted = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        try:
            found = parse(given, parsing_timeout=None)
            right = bool(wanted and found) and verify(
                parse(wanted, parsing_timeout=None), found, timeout_seconds=None
            )
        except Exception:  # of text that nobody has checked sympy makes any error
            found, right = [], False
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply([next((text for text in found if isinstance(text, str)), None), bool(right)])


if __name__ == "__main__":
    main()
