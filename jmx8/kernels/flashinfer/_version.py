"""Which FlashInfer jmx8 works with: its modules and kernels are private to it."""

import importlib.metadata


# jmx8 calls functions that FlashInfer may change in any release, so that the versions
# are those that its tests ran with, and no range.
TESTED = "0.7.2.post1"


def installed_version(distribution: str = "flashinfer-python") -> str | None:
    """Returns the version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_problem() -> str | None:
    """Returns why the FlashInfer that is installed cannot be used, None if it can."""
    version = installed_version()
    if version is None:
        return f"FlashInfer is not installed: `pip install flashinfer-python=={TESTED}`"
    if version != TESTED:
        return (
            f"FlashInfer {version} is installed and jmx8 works with {TESTED} alone: "
            f"`pip install flashinfer-python=={TESTED}`"
        )
    return None
