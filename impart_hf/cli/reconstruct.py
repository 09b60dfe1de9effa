"""The command `impart-hf reconstruct`."""

import argparse

from .options import add_base_model, add_device, add_quiet, add_repository, add_shard_size, check_revision, given


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_repository(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write the dense checkpoint to")
    add_base_model(parser)
    add_device(parser, "tensors are decoded")
    add_shard_size(parser)
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.repo)


def run(options: argparse.Namespace) -> None:
    """Write the dense checkpoint."""
    from ..common.devices import usable_device
    from ..common.progress import Progress
    from ..modeling.model_files import HubOptions
    from ..repository.open import open_repository
    from ..repository.reconstruct import reconstruct

    device = usable_device(options.device or "cpu")
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    reconstruct(
        repository,
        options.output,
        device=device,
        progress=Progress(not options.quiet),
        **given(options, "max_shard_size"),
    )
    print(f"{options.output}: the dense checkpoint of {options.repo}")
