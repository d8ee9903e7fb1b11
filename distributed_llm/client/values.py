"""What a client is told besides answers. Pure values."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from distributed_llm.common.messages import Usage
from distributed_llm.common.roles import Role


@dataclass(frozen=True)
class NewToken:
    """A token by which machines enrol.

    Attributes:
        line: `dllm://...`, to be given to `dllm join`; a secret.
        id: its name for people, which is no secret.
        addresses: "HOST:PORT"s at which other machines reach the coordinator, best first, which is
            the one in the line; none if they cannot.
    """

    line: str = field(repr=False)
    id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """Who a client is to its coordinator.

    Attributes:
        name: by which it is enrolled; empty without keys.
        role: what it may do.
        model: name of the model that the coordinator serves.
    """

    name: str
    role: Role
    model: str


@dataclass(frozen=True, eq=False)
class Embedding:
    """A prompt as a vector.

    Attributes:
        vector: mean of the model's last hidden states over the positions of the prompt, float32
            [hidden_size]; not normalised.
        usage: token counts.
    """

    vector: npt.NDArray[np.float32]
    usage: Usage


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model takes it.

    Attributes:
        token_ids: of the whole prompt, special tokens included if they were asked for.
    """

    token_ids: list[int]
