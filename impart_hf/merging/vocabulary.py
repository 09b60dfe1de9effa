"""The vocabulary of a merged model. Each model of a merge may have added tokens to the base's, or renamed some."""

from collections.abc import Mapping
from functools import cached_property

from ..calibration.text import load_tokenizer
from ..compression.compatibility import IncompatibleModelsError
from ..modeling.checkpoints import HubOptions


class Tokens:
    """A model's tokens by number; empty if it has no tokenizer, which merging its weights does not need.

    Attributes:
        source, options: location of its tokenizer, and how to read it.
    """

    def __init__(self, source: str, options: HubOptions):
        self.source, self.options = source, options

    @cached_property
    def _tokenizer(self) -> tuple[Mapping[int, str], str | None]:
        """What is kept of the tokenizer: its tokens by number, and its chat template."""
        try:
            tokenizer = load_tokenizer(self.source, self.options)
        except ValueError:
            return {}, None
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, Mapping):  # of several, by name
            template = template.get("default")
        return {number: token for token, number in tokenizer.get_vocab().items()}, template

    @property
    def by_number(self) -> Mapping[int, str]:
        return self._tokenizer[0]

    @property
    def chat_template(self) -> str | None:
        """Its chat template, or None."""
        return self._tokenizer[1]

    def beyond(self, base: "Tokens") -> dict[int, str]:
        """Return the tokens that the base does not have, or has under another name."""
        base_tokens = base.by_number
        return {number: token for number, token in self.by_number.items() if base_tokens.get(number) != token}

    def may_have(self, number: int) -> bool:
        """Return whether this is one of its tokens; True if that is unknown because there is no tokenizer."""
        return not self.by_number or number in self.by_number


def model_with_all_tokens(base: Tokens, models: Mapping[str, Tokens]) -> str | None:
    """Return the name of the model whose tokenizer has the tokens of all models; None for the base.

    Raises:
        IncompatibleModelsError: if two models use one number for different tokens, or no tokenizer has all tokens.
    """
    added = {name: tokens.beyond(base) for name, tokens in models.items()}
    seen: dict[int, tuple[str, str]] = {}
    for name, theirs in added.items():
        for number, token in theirs.items():
            other, first = seen.setdefault(number, (token, name))
            if other != token:
                raise IncompatibleModelsError(
                    f"token {number} is {other!r} in '{first}' and {token!r} in '{name}': their added tokens cannot "
                    "be united; choose one model's tokenizer with tokenizer_source, or `base`"
                )
    most = max(added, key=lambda name: len(added[name]))
    if lost := sorted(seen.keys() - added[most].keys()):
        token, name = seen[lost[0]]
        raise IncompatibleModelsError(
            f"token {lost[0]} ({token!r}) of '{name}' is not in '{most}', which added the most: no tokenizer has the "
            "tokens of all models; choose one model's tokenizer with tokenizer_source, or `base`"
        )
    return most if added[most] else None
