"""Puts the compiled Hopper kernels into the wheel where there is a CUDA toolkit.

With `JMX8_WHEEL_KERNELS=1` building a wheel fails where there is none, with `0` no
wheel carries kernels. What a wheel does not carry is compiled at the first call.
"""

import importlib
import os
import pathlib
import sys
import sysconfig
import types
from typing import Any

from hatchling.builders.hooks.plugin.interface import (  # pyright: ignore[reportMissingImports]
    BuildHookInterface,
)


class KernelsHook(BuildHookInterface):
    """The build hook; an editable installation compiles nothing."""

    def dependencies(self) -> list[str]:
        return ["apache-tvm-ffi>=0.1.15"] if self._why_not() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        if problem := self._why_not():
            if os.environ.get("JMX8_WHEEL_KERNELS") == "1":
                raise RuntimeError(f"JMX8_WHEEL_KERNELS is 1, and {problem}.")
            self.app.display_info(f"The wheel carries no compiled kernels: {problem}.")
            return
        build = self._build_module()
        library, prebuilt = build.build(), build.PREBUILT.relative_to(self.root)
        for suffix in (".so", ".json"):
            source, target = library.with_suffix(suffix), prebuilt.with_suffix(suffix)
            build_data["force_include"][str(source)] = str(target)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def _why_not(self) -> str | None:
        if os.environ.get("JMX8_WHEEL_KERNELS") == "0":
            return "JMX8_WHEEL_KERNELS is 0"
        return self._build_module().missing_toolkit()

    def _build_module(self) -> Any:
        """Imports the module that compiles, without what jmx8 imports, such as jax."""
        package = types.ModuleType("jmx8")
        package.__path__ = [str(pathlib.Path(self.root, "jmx8"))]
        sys.modules.setdefault("jmx8", package)
        return importlib.import_module("jmx8.kernels.sm90._build")
