#!/usr/bin/env bash
# Set up on macOS. See --help.
#
# Builds of PyTorch: on a Mac there is one, which computes on Apple's processors and graphics. There
# is none for Macs with Intel processors any more.
set -euo pipefail

# shellcheck disable=SC2034 # read by common.sh
os_name=Darwin

python_hint() {
    echo "Install it: brew install python@3.12, or the installer of Python's own site."
}

venv_hint() {
    echo "Install Python anew: brew reinstall python@$1"
}

torch_note() {
    if [[ -z $dry_run && $("$python" -c 'import platform; print(platform.machine())') != arm64 ]]; then
        die 1 "PyTorch has no build for Python on Intel processors under macOS." \
            "On a Mac with an Apple processor: install Python for it and run this again with" \
            "PYTHON=/path/to/it (remove .venv first). On an Intel Mac: use Linux in a virtual machine."
    fi
    say "PyTorch: the build for Apple processors."
}

# shellcheck source=setup_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
main "$@"
