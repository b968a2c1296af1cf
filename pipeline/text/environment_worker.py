"""The process in which `pipeline.text.environments` runs an environment: a line of JSON in, a line out.

The environment is the user's code, and trusted. It may hang, end its process or print: what it prints is dropped. A
question that takes longer than it may ends the process, even if redpen was killed meanwhile.

An object serves one rollout, turn after turn. If it is not here, because this process is new or held too many, the
reply is `{"lacks": true}`, and it has to be asked for the earlier turns first: each call has its own time.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from collections import OrderedDict
from typing import Any

#: Objects that are kept.
_MOST = 4096


def main() -> None:
    questions, replies = os.fdopen(os.dup(0), encoding="ascii"), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    nowhere = open(os.devnull, "w")  # noqa: SIM115  open to the end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for redpen, which goes on to end this process
    sys.path.insert(0, os.getcwd())
    objects: OrderedDict[str, tuple[Any, int]] = OrderedDict()
    for line in questions:
        question = json.loads(line)
        faulthandler.dump_traceback_later(question["seconds"], exit=True, file=nowhere)
        try:
            reply = json.dumps(_answer(question, objects), allow_nan=False)
        except BaseException as error:  # SystemExit, too
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
            where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:1000]}{where}"})
        faulthandler.cancel_dump_traceback_later()
        replies.write(reply + "\n")
        replies.flush()


def _answer(question: dict[str, Any], objects: OrderedDict[str, tuple[Any, int]]) -> dict[str, Any]:
    module, _, name = question["environment"].partition(":")
    factory = getattr(importlib.import_module(module), name)
    if "row" not in question:
        if not callable(factory):
            raise TypeError(f"{name} is not callable, but {type(factory).__name__}")
        if (file := getattr(sys.modules[module], "__file__", None)) is None:
            raise TypeError(f"{module} is not a module with a file")
        return {"file": file}
    key, messages, n_earlier = question["key"], question["messages"], question["n_earlier"]
    made, n_called = objects.pop(key, (None, 0))
    if not n_earlier:
        made = factory(question["row"])
    elif made is None or n_called != n_earlier:
        return {"lacks": True}
    reply = made.env_response(messages)
    objects[key] = made, n_earlier + 1
    if len(objects) > _MOST:
        objects.popitem(last=False)
    return {"messages": reply}


if __name__ == "__main__":
    main()
