"""The version of the package, which pyproject.toml reads from here, and those of others."""

from importlib import metadata

__version__ = "0.1.0"


def package_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
