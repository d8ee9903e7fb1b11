"""How much memory what arrives of another worker may take."""

from distributed_llm.worker.kv.manifest import KVTransferError


class ImportRoom:
    """Memory for the KV cache and the states of one transfer.

    Args:
        max_bytes: of all buffers and tensors together.

    Attributes:
        max_bytes: as given.
        nbytes: bytes of them that are taken.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0

    def take(self, nbytes: int) -> None:
        """Take so many bytes.

        Raises:
            KVTransferError: fewer are left.
        """
        self.ensure(self.nbytes + nbytes)
        self.nbytes += nbytes

    def ensure(self, nbytes: int) -> None:
        """Refuse what would take more than there is in all.

        Raises:
            KVTransferError: so many bytes are more than that.
        """
        if nbytes > self.max_bytes:
            raise KVTransferError(
                f"the KV cache that arrives takes more than the {self.max_bytes} bytes that are "
                "left for it"
            )

    def give_back(self, nbytes: int) -> None:
        """Have so many bytes be free again."""
        self.nbytes -= nbytes
