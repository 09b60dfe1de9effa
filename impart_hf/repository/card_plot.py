"""The plot of a delta repository in its own folder, shown by its model card."""

from io import BytesIO
from pathlib import Path

from ..common.files import atomic_write
from ..modeling.model_files import CheckpointError, HubOptions
from .inspection import Inspection

PICTURE = "delta.png"
_LINK = f"![Spectra, keep ratios and bytes by layer of the delta]({PICTURE})"


def add_card_plot(folder: str | Path) -> None:
    """Write the plot of `Inspection.plot` to a repository's folder, and a link to it at the end of its README.md.

    A plot that is there is replaced, and a link that is there stays where it is. Neither counts for the ratio.

    Raises:
        CheckpointError: if `folder` is no folder of a delta repository, or has no README.md.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is not a folder; a plot can be added to a card on this machine alone")
    card = folder / "README.md"
    picture = BytesIO()
    Inspection(str(folder), HubOptions()).plot(picture)
    if not card.is_file():
        raise CheckpointError(f"'{folder}' has no README.md that could show a plot; compress again, or write one")
    text = card.read_text("utf-8")
    with atomic_write(folder / PICTURE) as path:
        path.write_bytes(picture.getvalue())
    if f"]({PICTURE})" not in text:
        with atomic_write(card) as path:
            path.write_text(f"{text.rstrip()}\n\n{_LINK}\n", "utf-8")
