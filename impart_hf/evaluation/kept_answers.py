"""What a model has answered, kept in a file. lm-eval must be installed to import this module."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import CachingLM, hash_args

_ASKING = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class KeptAnswers(CachingLM):
    """lm-eval's model with a cache, for jobs of several processes too.

    The model's own calls have steps that all processes of a job do together. A process that finds all of its answers in
    the cache would leave the others waiting there, so it asks for one answer again.
    """

    def __getattr__(self, attr: str) -> Any:
        found = super().__getattr__(attr)
        return self._asking_together(attr, found) if attr in _ASKING else found

    def _asking_together(self, attr: str, ask: Callable) -> Callable:
        def asked(requests: Sequence[Any]) -> Any:
            keys = [hash_args(attr, request.args) for request in requests]
            if self.lm.world_size > 1 and keys and all(key in self.dbdict for key in keys):
                del self.dbdict[keys[0]]
            return ask(requests)

        return asked
