"""On PYTHONPATH, makes vLLM's newer model runner start on a CPU: its Triton kernels are interpreted, which is slow.

vLLM's CPU build looks for a Triton backend of that name; with TRITON_INTERPRET=1 it is never compiled for.
"""

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    class NoCompiler:
        @staticmethod
        def supports_target(target: Any) -> bool:
            return False

    class Interpreter:
        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> Any:
            return None

    triton.backends.backends["cpu"] = triton.backends.Backend(NoCompiler, Interpreter)
