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

is_root() { [[ $(id -u) == 0 ]]; }

label() { echo "distributed-llm.$role"; }

service_domain() {
    if is_root; then
        echo system
    else
        echo "gui/$(id -u)"
    fi
}

service_file() {
    if is_root; then
        echo "/Library/LaunchDaemons/$(label).plist"
    else
        echo "$HOME/Library/LaunchAgents/$(label).plist"
    fi
}

log_file() {
    if is_root; then
        echo "/Library/Logs/dllm-$role.log"
    else
        echo "$HOME/Library/Logs/dllm-$role.log"
    fi
}

# xml TEXT: an element <string>
xml() {
    printf '%s\n' "$1" |
        sed -e 's/&/\&amp;/g' -e 's/</\&lt;/g' -e 's/>/\&gt;/g' -e 's/.*/<string>&<\/string>/'
}

service_text() {
    local argument
    cat <<END
<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0">
<dict>
  <key>Label</key>
  $(xml "$(label)")
  <key>ProgramArguments</key>
  <array>
END
    for argument in "${command_line[@]}"; do
        echo "    $(xml "$argument")"
    done
    cat <<END
  </array>
  <key>WorkingDirectory</key>
  $(xml "$root")
  <key>RunAtLoad</key>
  <true/>
  <key>KeepAlive</key>
  <true/>
  <key>StandardOutPath</key>
  $(xml "$(log_file)")
  <key>StandardErrorPath</key>
  $(xml "$(log_file)")
END
    if is_root; then
        printf '  %s\n' "<key>UserName</key>" "$(xml "${SUDO_USER:-root}")"
    fi
    printf '%s\n' "</dict>" "</plist>"
}

service_check() { :; }

service_start() {
    run launchctl bootout "$(service_domain)/$(label)" 2>/dev/null || true # an earlier version of it
    run launchctl bootstrap "$(service_domain)" "$(service_file)" || die 1 \
        "macOS did not start the service; it says above why." \
        "Over ssh without a desktop session, install it for the whole machine: sudo $0 $role --service"
    is_root || say "It starts when you log in. To start it before that, install it with sudo."
}

service_stop() { run launchctl bootout "$(service_domain)/$(label)" || true; } # may not run now

service_logs() { echo "tail -f $(log_file)"; }

# shellcheck source=setup_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
main "$@"
