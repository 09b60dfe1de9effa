"""Reading a delta for a base that is in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..common.meta_model import reads_text
from ..modeling.delta_repository import DeltaRepository, WrongBaseError
from ..modeling.model_files import fetch_file
from ..modeling.repository_files import delta_digest
from .calls import calls_some_tokens, chosen
from .effects import Effect
from .placement import Placement


@dataclass(frozen=True)
class LoadedDelta:
    """A delta that is in memory.

    Attributes:
        repository: where it was read from.
        digest: of the repository's content, by which a change of its files is told.
        packed: whether matrices stay packed.
        effects: what it does to the base's modules, by name.
        generation_config: the fine-tune's, with nothing left to the base's.
    """

    repository: DeltaRepository
    digest: str
    packed: bool
    effects: Mapping[str, Effect]
    generation_config: GenerationConfig


class DeltaReader:
    """Reads deltas for one base.

    Attributes:
        is_quantised: whether the base is, so that its weights cannot be compared.
    """

    def __init__(self, base: PreTrainedModel):
        self._base, self._reached = base, set[str]()  # modules that a forward pass is known to call
        self.is_quantised = getattr(base, "hf_quantizer", None) is not None

    def placement(self, repository: DeltaRepository, packed: bool) -> Placement:
        """Return where a delta acts; errors as for `Placement`."""
        return Placement(self._base, repository, packed, self.is_quantised)

    def again(self, loaded: LoadedDelta) -> LoadedDelta:
        """Read a delta for the base as it is now, on another device or in another dtype."""
        return replace(loaded, effects=self.placement(loaded.repository, loaded.packed).effects())

    def read(self, repository: DeltaRepository, packed: bool) -> LoadedDelta:
        """Read a delta, after checking that the base is its base.

        Raises:
            ValueError: if it does not fit the base's modules.
            DeltaFormatError, WrongBaseError: if it is damaged, or another base's.
        """
        placement = self.placement(repository, packed)
        if self.is_quantised:
            self._check_name_of_base(repository)
        else:
            placement.check_base()
        effects = placement.effects()
        self._check_reached(effects)
        digest = delta_digest(repository.file, repository.config)
        return LoadedDelta(repository, digest, packed, effects, _generation_config(repository))

    def _check_name_of_base(self, repository: DeltaRepository) -> None:
        own, recorded = getattr(self._base, "name_or_path", ""), repository.config.base_model_name_or_path
        if own not in (recorded, repository.base.source):
            raise WrongBaseError(
                f"the quantised base was loaded from '{own}', the delta '{repository.source}' was made against "
                f"'{recorded}': of a quantised model, only the name can be compared"
            )

    def _check_reached(self, effects: Mapping[str, Effect]) -> None:
        """Check, by a forward pass of two tokens, that the modules with effects are called, and not read otherwise.

        Raises:
            ValueError: if one is not.
        """
        reads = reads_text(self._base)
        # Of experts, a token reaches some.
        wanted = {name for name in effects if reads(f"{name}.") and not calls_some_tokens(name)} - self._reached
        called: set[str] = set()
        handles = [
            self._base.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
            for name in wanted
        ]
        try:
            with chosen(None), torch.no_grad():
                if handles:
                    self._base(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self._base.device))
        finally:
            for handle in handles:
                handle.remove()
        if missed := sorted(wanted - called):
            raise ValueError(
                f"{type(self._base).__name__} reads the weights of {missed[0]} without calling it: it cannot have "
                "deltas beside it"
            )
        self._reached |= called


def _generation_config(repository: DeltaRepository) -> GenerationConfig:
    """Return the settings of generation that loading the fine-tune gives, with nothing left to the base's."""
    found = fetch_file(repository.source, GENERATION_CONFIG_NAME, repository.options)
    if found is None:
        config = GenerationConfig.from_model_config(repository.text_config)
    else:
        config = GenerationConfig.from_pretrained(found.parent)
    for name, value in GenerationConfig._get_default_generation_params().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config
