"""Hands FlashInfer's modules the cubins that they ask for, without FlashInfer.

A module of the trtllm-gen family has no device code of its own. It calls back with
the name and the SHA-256 of a cubin and expects its bytes: plain C functions, so that a
process that only runs needs neither FlashInfer nor torch for it.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import pathlib

from ._version import installed_version, TESTED


_log = logging.getLogger("jmx8")
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
# The libraries keep bare pointers: these must live as long as the process.
_callbacks: dict[pathlib.Path, object] = {}

HOW_TO_FETCH = (
    "run `flashinfer download-cubin` where there is a network, or install "
    f"flashinfer-cubin=={TESTED}; FLASHINFER_CUBIN_DIR names a folder that was copied, "
    "FLASHINFER_CUBINS_REPOSITORY a mirror or a folder to fetch from"
)


def cubin_folder() -> pathlib.Path:
    """Returns the folder that FlashInfer keeps cubins and their headers in."""
    if folder := os.environ.get("FLASHINFER_CUBIN_DIR"):
        return pathlib.Path(folder)
    spec = importlib.util.find_spec("flashinfer_cubin")
    if spec is not None and installed_version("flashinfer-cubin") == TESTED:
        return pathlib.Path(str(spec.origin)).parent / "cubins"
    return flashinfer_cache() / "cubins"


def flashinfer_cache() -> pathlib.Path:
    """Returns the folder that FlashInfer keeps what it builds and fetches in."""
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or pathlib.Path.home()
    return pathlib.Path(base, ".cache/flashinfer")


def has_cubins() -> bool:
    """Tells whether cubins of batched GEMMs, which the MoE is made of, were fetched."""
    return any(cubin_folder().glob("*/batched_gemm-*/**/*.cubin"))


def read_cubin(name: str, sha256: str) -> bytes:
    """Returns a cubin's bytes; none, and an error in the log, if it is not there."""
    path = cubin_folder() / name
    try:
        data = path.read_bytes()
    except OSError as error:
        _log.error("FlashInfer asks for a cubin: %s; %s", error, HOW_TO_FETCH)
        return b""
    if os.environ.get("FLASHINFER_CUBIN_CHECKSUM_DISABLED"):
        return data
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        _log.error(
            "%s has SHA-256 %s, not %s: remove it and %s",
            path,
            found,
            sha256,
            HOW_TO_FETCH,
        )
        return b""
    return data


def serve_cubins(library: pathlib.Path) -> None:
    """Makes a library that is loaded get its cubins from `cubin_folder()`."""
    if library in _callbacks:
        return
    functions = ctypes.CDLL(str(library))

    def answer(name: bytes, sha256: bytes) -> None:
        # No exception can leave a callback, and a library that is not answered would
        # use the cubin before: so it gets none first.
        functions.FlashInferSetCurrentCubin(b"", 0)
        data = read_cubin(name.decode(), sha256.decode())
        functions.FlashInferSetCurrentCubin(data, len(data))

    _callbacks[library] = _CALLBACK(answer)
    functions.FlashInferSetCubinCallback(_callbacks[library])
