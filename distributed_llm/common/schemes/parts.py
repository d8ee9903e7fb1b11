"""Sorts tensors of files into the parts of quantized weights, and checks that they fit."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.stored_weights import Scheme, StoredWeight


class NotRead(Exception):
    """Says in which way a model is quantized that is not read, for people."""


Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Module:
    """The tensors of one quantized layer of a model.

    Attributes:
        name: of the layer ("model.layers.0.mlp.up_proj").
        kind: what its format is called, for messages.
        parts: its tensors, by their own names ("qweight").
    """

    name: str
    kind: str
    parts: dict[str, TensorInfo] = field(default_factory=dict)

    def part(self, name: str, dtypes: Collection[str], rank: int | None = None) -> TensorInfo:
        """Return the part with this name, one of `dtypes`.

        Raises:
            CheckpointError: it is missing, of another dtype, or has another number of dimensions.
        """
        found = self.parts.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.name} is quantized ({self.kind}), and its tensor {name} is missing. "
                f"{_OTHER_COPY}"
            )
        if found.dtype not in dtypes or rank not in (None, len(found.shape)):
            raise self.unfit(name, f"{' or '.join(sorted(dtypes))} is expected")
        return found

    def check(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raise if part `name`, where there is one, has none of these shapes.

        Raises:
            CheckpointError: with what it has and what it should have.
        """
        if name in self.parts and self.parts[name].shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.unfit(name, f"{expected} is expected beside the other tensors")

    def unfit(self, name: str, expected: str) -> CheckpointError:
        """Return the error for a part that does not fit the others."""
        part = self.parts[name]
        return CheckpointError(
            f"{part.name} is {part.dtype} {list(part.shape)}, and {expected} ({self.kind}). "
            f"{_OTHER_COPY}"
        )

    def weight(self, shape: tuple[int, ...], scheme: Scheme, *names: str) -> StoredWeight:
        """Return the weight that these parts make; those that are not there are left out."""
        parts = {name: self.parts[name] for name in names if name in self.parts}
        return StoredWeight(f"{self.name}.weight", shape, parts, scheme)


_OTHER_COPY = (
    "Either the files were not saved as a whole, or config.json is that of another model. Use "
    "another copy of the model."
)


def modules(tensors: Tensors, kind: str, main: str, names: Collection[str]) -> Iterator[Module]:
    """Yield the layers that have a tensor called `main`, with those of their tensors in `names`.

    Names may have dots ("weight.absmax").
    """
    known = {main, *names}
    for name in tensors:
        if name.endswith(f".{main}"):
            layer = name.removesuffix(f".{main}")
            held = ((part, tensors.get(f"{layer}.{part}")) for part in sorted(known))
            yield Module(layer, kind, {part: tensor for part, tensor in held if tensor})
