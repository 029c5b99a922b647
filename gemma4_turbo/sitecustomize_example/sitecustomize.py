"""Turns gemma4_turbo on in every Python process started with this folder on PYTHONPATH.

    PYTHONPATH=$(gemma4-turbo sitecustomize) sglang serve ...
    PYTHONPATH=/path/to/sitecustomize_example python -m sglang.launch_server ...

Needed only where the entry point does not reach: gemma4_turbo not installed with pip, or
``SGLANG_PLUGINS`` naming other plugins. Python runs exactly one ``sitecustomize``, so this one
first runs the one that it shadows (Debian and many images ship one).

Others do the same, and come back here: each of them runs once, whatever their order on the path.
"""


def _gemma4_turbo_sitecustomize() -> None:
    # One name, and no other global is read: another sitecustomize may run this file with exec(),
    # among its own names.
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    name = "sitecustomize"
    # For all copies of this file in the process. Those in "started" never start again.
    state = vars(sys).setdefault(
        "_gemma4_turbo_sitecustomize", {"started": set(), "inside": 0, "bootstrapped": False}
    )

    def start_next() -> None:
        frame, started = sys._getframe(), state["started"]
        own = os.path.realpath(frame.f_code.co_filename)
        while frame is not None:  # who runs us, and whom they run for, without our help
            for path in (frame.f_code.co_filename, frame.f_globals.get("__file__")):
                if isinstance(path, str) and name in path:
                    started.add(os.path.realpath(path))
            frame = frame.f_back
        spec, front = None, None
        for entry in sys.path:
            found = PathFinder.find_spec(name, [entry])
            if found is None or found.loader is None or not found.origin:
                continue
            origin = os.path.realpath(found.origin)
            if origin == own:
                front = front or entry
            elif spec is None and origin not in started:
                spec = found
        if spec is None:
            return
        started.add(os.path.realpath(spec.origin))
        # It takes our place, as if we were not there; not if who runs us kept it for itself.
        before = sys.modules.get(name)
        ours = (
            before is not None
            and vars(before) is globals()
            and os.path.realpath(getattr(before, "__file__", None) or "") == own
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        # If it chains too, it is to find us first, not one that has started already.
        front = None if front is None else "".join(list(front))  # an object of its own
        if front is not None:
            sys.path.insert(0, front)
        done = False
        try:
            spec.loader.exec_module(module)
            done = True
        finally:
            sys.path[:] = [entry for entry in sys.path if entry is not front]
            if ours and done:
                sys.modules.setdefault(name, module)
            elif before is not None:
                sys.modules[name] = before
            else:
                sys.modules.pop(name, None)

    def bootstrap() -> None:
        state["bootstrapped"] = True
        try:
            import gemma4_turbo

            gemma4_turbo.bootstrap()
        except ImportError as error:
            print(
                f"sitecustomize_example: gemma4_turbo is not on the path: {error}", file=sys.stderr
            )
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            print(f"sitecustomize_example: this process stays stock: {what}", file=sys.stderr)

    state["inside"] += 1
    try:
        start_next()
    finally:  # site.py reports what another one raised, as it would without us
        state["inside"] -= 1
        if not state["inside"] and not state["bootstrapped"]:
            bootstrap()


_gemma4_turbo_sitecustomize()
