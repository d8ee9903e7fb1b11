"""What this process uses for its weights: the choice measured on this machine, or the usual one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from distributed_llm.common.weight_forms import SMALLEST
from distributed_llm.worker.model.kernels.choice import ROWS, Choice, Kind, size_of
from distributed_llm.worker.model.kernels.orders import FLOAT, usual

_measured: dict[str, Choice] = {}

_PLAIN = {"rows", "pack", "blocks"}
"""Orders that are tensors, whose memory may be that of a file."""

_only_plain: ContextVar[bool] = ContextVar("only_plain", default=False)


def use(choices: Mapping[str, Choice]) -> None:
    """Set the choices, by `str` of their kinds, for weights that are loaded from now on."""
    _measured.clear()
    _measured.update(choices)


def choice_for(kind: Kind) -> Choice:
    """Return what to use for weights of a kind."""
    choice = _measured.get(str(kind)) or usual(kind)
    if _only_plain.get() and choice.order not in _PLAIN:
        return Choice("rows", ("linear" if kind.form == "float" else "upcast",) * len(ROWS))
    return choice


@contextmanager
def only_plain(wanted: bool = True) -> Iterator[None]:
    """Use orders that are tensors, and no others, for weights that this thread loads meanwhile."""
    token = _only_plain.set(wanted)
    try:
        yield
    finally:
        _only_plain.reset(token)


def fastest_linear(linear: nn.Linear) -> nn.Module:
    """Return a layer that computes what `linear` does, the fastest one on this machine.

    That may be `linear` itself; if not, its weight is not needed any more.
    """
    weight = linear.weight
    if not is_worth_it(weight):
        return linear
    choice = choice_for(
        Kind("float", str(weight.dtype).removeprefix("torch."), size_of(weight.numel()))
    )
    if choice.order == "rows" and set(choice.kernels) == {"linear"}:
        return linear
    layer = FLOAT[choice.order](linear)
    layer.use(choice.kernels)
    return layer


def is_worth_it(weight: Tensor) -> bool:
    """Return whether a weight is one that kernels are chosen for: on a CPU, and not tiny."""
    return weight.device.type == "cpu" and weight.numel() >= SMALLEST


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of `model` by those that are the fastest on this machine.

    Each weight is freed as soon as it is packed. A weight that another module reads too, such as a
    head that is tied to the embedding, stays as it is: packed, it would be in memory twice.
    """
    shared = _shared_weights(model)
    names = [
        name for name, _ in model.named_modules()
    ]  # a list of the modules themselves would keep all of them in memory
    for name in names:
        module = model.get_submodule(name)
        if type(module) is nn.Linear and id(module.weight) not in shared:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, fastest_linear(module))


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the `id` of each parameter that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        shared |= seen & own
        seen |= own
    return shared
