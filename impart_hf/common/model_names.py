"""Names of models in a merge's configuration; imports nothing, for the command line's start."""

import os


def split_adapter(name: str) -> tuple[str, str]:
    """Return the model and the adapter of `MODEL+ADAPTER`, a name in a merge's configuration; "" without an adapter."""
    if os.path.isdir(name):
        return name, ""
    # A folder's name may have a plus of its own.
    places = [place for place, letter in enumerate(name) if letter == "+"]
    place = next((p for p in places if os.path.isdir(name[:p])), places[0] if places else len(name))
    return name[:place], name[place + 1 :]
