"""Names of tensors that were saved from inside a wrapper around the model."""

import re
from collections.abc import Iterable

# torch's own wrappers add to names anywhere; others come before all names of a model.
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "base_model.model.", "_forward_module.")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return the names of a model's tensors without those of torch.compile, FSDP, DistributedDataParallel or PEFT.

    Args:
        names: the names of all tensors of the model.

    Returns:
        The plain name of each.
    """
    plain = {name: _INNER.sub("", name) for name in names}
    while plain and (prefix := next((p for p in _OUTER if all(n.startswith(p) for n in plain.values())), None)):
        plain = {name: shorter.removeprefix(prefix) for name, shorter in plain.items()}
    return plain
