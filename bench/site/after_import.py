"""What `sitecustomize` needs of wrapt, for the environments of other engines that have none."""

import importlib.util
import sys


class _Finder:
    """Runs functions once their module is there."""

    def __init__(self):
        self.waiting = {}
        self.looking = set()

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting or name in self.looking:
            return None
        self.looking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            run, hooks = spec.loader.exec_module, self.waiting

            def exec_module(module):
                run(module)
                for hook in hooks.pop(name, ()):
                    hook(module)

            spec.loader.exec_module = exec_module
        return spec


_finder = _Finder()


def register_post_import_hook(hook, name):
    """Call ``hook(module)`` after the module of this name was imported, or now."""
    if name in sys.modules:
        hook(sys.modules[name])
        return
    _finder.waiting.setdefault(name, []).append(hook)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
