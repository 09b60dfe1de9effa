"""Whose tokens the merged model has: every model of a merge may have added some to the base's, or renamed some."""

from collections.abc import Mapping
from functools import cached_property

from ..calibration.text import load_tokenizer
from ..compression.compatibility import IncompatibleModelsError
from ..modeling.checkpoints import HubOptions


class Tokens:
    """A model's tokens by number; none where it has no tokenizer, which is no matter for its weights.

    Attributes:
        source, options: where its tokenizer is, and how it is found.
    """

    def __init__(self, source: str, options: HubOptions):
        self.source, self.options = source, options

    @cached_property
    def by_number(self) -> Mapping[int, str]:
        try:
            vocabulary = load_tokenizer(self.source, self.options).get_vocab()
        except ValueError:
            return {}
        return {number: token for token, number in vocabulary.items()}

    def beyond(self, base: "Tokens") -> dict[int, str]:
        """Those that the base does not have, or has under another name."""
        own = base.by_number
        return {number: token for number, token in self.by_number.items() if own.get(number) != token}

    def may_have(self, number: int) -> bool:
        """Whether this is one of its tokens, as far as can be known."""
        return not self.by_number or number in self.by_number


def united(base: Tokens, models: Mapping[str, Tokens]) -> str | None:
    """The name of the model whose tokenizer has the tokens of all; None for the base.

    Raises:
        IncompatibleModelsError: if two models mean different tokens by one number, or no tokenizer has all.
    """
    added = {name: tokens.beyond(base) for name, tokens in models.items()}
    seen: dict[int, tuple[str, str]] = {}
    for name, theirs in added.items():
        for number, token in theirs.items():
            other, first = seen.setdefault(number, (token, name))
            if other != token:
                raise IncompatibleModelsError(
                    f"token {number} is {other!r} in '{first}' and {token!r} in '{name}': their added tokens cannot "
                    "be united; choose one model's with tokenizer_source, or `base`"
                )
    most = max(added, key=lambda name: len(added[name]))
    if lost := sorted(seen.keys() - added[most].keys()):
        token, name = seen[lost[0]]
        raise IncompatibleModelsError(
            f"token {lost[0]} ({token!r}) of '{name}' is not in '{most}', which has added most: no tokenizer has the "
            "tokens of all models; choose one model's with tokenizer_source, or `base`"
        )
    return most if added[most] else None
