"""What the holder of a key may do."""

from enum import Enum


class Role(Enum):
    """What a machine, or whoever enrols by a token, may do.

    Attributes:
        CLIENT: ask for answers, cancel its own, see the status of the cluster.
        WORKER: serve layers.
        ADMIN: all of that, and drain workers, make tokens, remove machines.
    """

    CLIENT = "client"
    WORKER = "worker"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        """Return whether who has this role may do what `other` may."""
        return self in (other, Role.ADMIN)
