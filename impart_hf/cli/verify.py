"""The command `impart-hf verify`."""

import argparse

from .options import add_base_model, add_device, add_quiet, add_repository, check_revision


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_repository(parser)
    add_base_model(parser)
    add_device(parser, "tensors are decoded")
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.repo)


def run(options: argparse.Namespace) -> None:
    """Decode every tensor, and report that the repository is sound."""
    from ..common.devices import usable_device
    from ..common.progress import Progress
    from ..modeling.model_files import HubOptions
    from ..repository.open import open_repository
    from ..repository.verify import verify

    device = usable_device(options.device or "cpu")
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    verify(repository, device=device, progress=Progress(not options.quiet))
    bases = " on ".join(link.base.source for link in repository.chain)
    print(f"{options.repo}: {len(repository.names())} tensors are sound, the base is {bases}")
