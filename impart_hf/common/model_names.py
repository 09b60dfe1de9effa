"""Names of models with what belongs to them: an adapter, a revision; imports nothing for the command line's start."""

import os


def split_adapter(name: str) -> tuple[str, str]:
    """Return the model and the adapter of `MODEL+ADAPTER`, a name in a merge's configuration; "" without an adapter."""
    if os.path.isdir(name):
        return name, ""
    # A folder's name may have a plus of its own.
    places = [place for place, letter in enumerate(name) if letter == "+"]
    place = next((p for p in places if os.path.isdir(name[:p])), places[0] if places else len(name))
    return name[:place], name[place + 1 :]


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the folder or Hub id, and the revision, of `ID@REVISION`; None without a revision."""
    source, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    return source, revision or None
