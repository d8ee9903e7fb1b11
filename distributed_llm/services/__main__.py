"""Removes a service without the package being installed: `python -m distributed_llm.services`."""

import sys

from distributed_llm.services.perform import remove
from distributed_llm.services.steps import ROLES, ServiceError


def main(words: list[str]) -> int:
    """Remove the service that `words` name, as in `remove worker`; return the exit code."""
    match [word for word in words if word != "--dry-run"]:
        case ["remove", role] if role in ROLES:
            try:
                remove(role, print, dry_run="--dry-run" in words)
            except ServiceError as exc:
                print(exc, file=sys.stderr)
                return 1
            return 0
        case _:
            print(f"Say which to remove: remove {'|'.join(ROLES)} [--dry-run]", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
