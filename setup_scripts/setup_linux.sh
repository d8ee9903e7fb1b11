#!/usr/bin/env bash
# Set up on Linux. See --help.
#
# Builds of PyTorch: on Linux the one that pip finds by itself is for NVIDIA graphics cards. The
# smaller one for CPUs comes from PyTorch's own package index; set DLLM_TORCH_INDEX_URL to its
# address, which PyTorch's page "Get started" shows. Only PyTorch is looked for there.
set -euo pipefail

# shellcheck disable=SC2034 # read by common.sh
os_name=Linux

python_hint() {
    if command -v apt-get >/dev/null; then
        echo "Install it: sudo apt-get install python3 python3-venv (Debian 12, Ubuntu 24.04 or newer)"
    elif command -v dnf >/dev/null; then
        echo "Install it: sudo dnf install python3.12"
    elif command -v pacman >/dev/null; then
        echo "Install it: sudo pacman -S python"
    elif command -v zypper >/dev/null; then
        echo "Install it: sudo zypper install python312"
    elif command -v apk >/dev/null; then
        echo "Alpine Linux has no builds of PyTorch. Use a distribution with glibc, such as Debian."
    else
        echo "Install the package python3 of your distribution, 3.11 or newer."
    fi
}

venv_hint() {
    if command -v apt-get >/dev/null; then
        echo "Install it: sudo apt-get install python$1-venv"
    else
        echo "Install the package of your distribution with the module venv for Python $1."
    fi
}

torch_note() {
    if [[ -n ${DLLM_TORCH_INDEX_URL:-} ]]; then
        say "PyTorch: the build that DLLM_TORCH_INDEX_URL offers."
    elif nvidia-smi >/dev/null 2>&1; then
        say "PyTorch: the default build, which uses the NVIDIA graphics card found here."
    else
        say "PyTorch: the default build; no NVIDIA graphics card was found here. Should pip fetch"
        say "gigabytes for such cards, stop it, set DLLM_TORCH_INDEX_URL (see the top of this script)"
        say "and run this again: the build for CPUs is much smaller."
    fi
}

# shellcheck source=setup_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
main "$@"
