"""What follows the import of a module of somebody else's, whenever that comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def when_imported(name: str, call: Callable[[], object]) -> None:
    """Call something as soon as a module has been imported: at once if it has been already."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self.name = name
        self.call = call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where that module is found anyway, by a loader that calls afterwards; of others nothing."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            self.call()

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec
