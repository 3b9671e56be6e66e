"""Packages that import what they offer when it is first asked for (PEP 562).

JAX takes longer to import than a checkpoint of many files takes to describe, so a
package that parts of the command line import must not import it at once.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def offer(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package that offers what its `_api` has.

    After the first access it is a package like any other. A name must not be that of a
    submodule too, which importing the submodule would bind.
    """

    def load() -> dict[str, Any]:
        api = vars(importlib.import_module("._api", package))
        names = {name: api[name] for name in api if not name.startswith("_")}
        namespace = vars(sys.modules[package])
        namespace.update(names)
        return namespace

    def get(name: str) -> Any:
        if name == "__all__":  # of `from package import *`
            return [name for name in load() if not name.startswith("_")]
        # Python itself asks for other names of this kind, of every module.
        if not name.startswith("__") and name in (namespace := load()):
            return namespace[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(load())
