"""The errors to report for exceptions in the compute thread."""

import logging

import torch

from distributed_llm.common.errors import DistributedLLMError, StageError

logger = logging.getLogger(__name__)


def reported(exc: Exception, what: str) -> DistributedLLMError:
    """Return the error to report for an exception, and log it if it is no error of this package.

    Args:
        exc: as raised.
        what: was being done.

    Raises:
        torch.AcceleratorError: `exc` is one: the device has failed, and with it all that it holds.
    """
    if isinstance(exc, torch.AcceleratorError):
        raise exc
    if isinstance(exc, DistributedLLMError):
        return exc
    logger.error("%s failed", what, exc_info=exc)
    return StageError(f"{what} failed: {type(exc).__name__}: {exc}"[:500] + ".")
