"""Turns gemma4_turbo on in every Python process started with this folder on PYTHONPATH.

    PYTHONPATH=/path/to/sitecustomize_example python -m sglang.launch_server ...

Needed only where the entry point does not reach: gemma4_turbo not installed with pip, or
``SGLANG_PLUGINS`` naming other plugins. Python runs exactly one ``sitecustomize``, so this one
first runs the one that it shadows (Debian and many images ship one).
"""

import importlib.machinery
import importlib.util
import os
import sys


def _run_shadowed() -> None:
    here = os.path.dirname(os.path.realpath(__file__))
    others = [path for path in sys.path if os.path.realpath(path or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _bootstrap() -> None:
    try:
        import gemma4_turbo
    except ImportError as error:
        print(f"sitecustomize_example: gemma4_turbo is not on the path: {error}", file=sys.stderr)
        return
    gemma4_turbo.bootstrap()


try:
    _run_shadowed()
finally:
    _bootstrap()
