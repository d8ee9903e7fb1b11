# shellcheck shell=bash
# What setting up on Linux and on macOS have in common. Sourced by setup_linux.sh and setup_macos.sh,
# which say in these what differs:
#   os_name                   as `uname -s` prints it
#   python_hint, venv_hint    how to install Python, and its venv module
#   torch_note                which build of PyTorch this machine gets
# Works with bash 3.2, which macOS has: hence ${array[@]+"${array[@]}"} for arrays that may be empty.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.installed
config=$root/config/local.yaml

role=
coordinator=
join_line=
name=
model=
bind=
service=
dry_run=
passed=() # on to dllm or pytest
command_line=()

usage() {
    cat <<END
Usage: setup_scripts/${0##*/} [ROLE] [OPTIONS]

Installs distributed_llm into .venv in this folder, then does what ROLE says. Run it again at any
time: what is done already is not done again.

Roles:
  (none)         only install, with the packages of developers
  demo           run a coordinator and three workers on this machine
  test           run all tests; their packages are installed too
  coordinator    run the coordinator
  worker         run a worker that joins a coordinator

Options:
  --coordinator WHERE       worker: the coordinator to join: the line dllm://... that "dllm token
                            create" prints there; HOST:PORT afterwards, or on its own machine
  --name NAME               worker: what to call it; default: after this machine
  --model MODEL             coordinator: folder or hub id of the model; default: a small built-in one
                            worker: folder of the model here, if it is not the coordinator's
  --bind HOST:PORT          coordinator: where to listen; default: only this machine
  --service                 worker, coordinator: run in the background, also after a restart
  --uninstall-service       worker, coordinator: stop that and remove it
  --dry-run                 print what would be done and change nothing
  --help                    print this

All that follows the role and is not listed here is passed on: to dllm, as in
"worker --threads 4 --max-memory 6GiB --peer-bind 0.0.0.0:5556", or to pytest. A service of a worker
waits for its coordinator (--wait).

Environment:
  PYTHON                    the Python to use; default: the first of 3.11 or newer
  DLLM_TORCH_INDEX_URL      a further package index for PyTorch, to get another build of it
END
}

say() { printf '%s\n' "$*"; }

# die EXIT_CODE MESSAGE...: what happened, why, what to do
die() {
    local code=$1
    shift
    printf '%s\n' "$@" >&2
    exit "$code"
}

# run COMMAND...: run it, or print it if this is a dry run
run() {
    if [[ -n $dry_run ]]; then
        printf 'would run:'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

parse_arguments() {
    local option= # the word before, if it was passed on: this may be its value
    while (($#)); do
        case $1 in
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case $1 in
            -h | --help) usage && exit 0 ;;
            --dry-run) dry_run=yes ;;
            --service) service=install ;;
            --uninstall-service) service=uninstall ;;
            --coordinator | --name | --model | --bind)
                [[ -n ${2:-} && $2 != -* ]] || die 2 "$1 needs a value. See --help."
                printf -v "${1#--}" '%s' "$2"
                shift
                option=
                ;;
            *)
                if [[ -n $role ]]; then
                    case $1 in
                        demo | test | coordinator | worker)
                            [[ -n $option ]] ||
                                die 2 "Two roles were given, $role and $1. Choose one."
                            ;;
                    esac
                    passed+=("$1")
                    option=
                    [[ $1 != -* ]] || option=$1
                else
                    case $1 in
                        demo | test | coordinator | worker) role=$1 ;;
                        -*) die 2 "Unknown option $1. Options of dllm follow the role. See --help." ;;
                        *) die 2 "Unknown role $1. Choose demo, test, coordinator or worker, or none." ;;
                    esac
                fi
                ;;
        esac
        shift
    done
}

check_arguments() {
    local line='^dllm://(.+)/[A-Za-z0-9_-]{43}\.[A-Za-z0-9_-]{43}$'
    local address='^([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$'
    if [[ $role != worker && -n $coordinator$name ]]; then
        die 2 "--coordinator and --name belong to the role worker."
    elif [[ $role != coordinator && -n $bind ]]; then
        die 2 "--bind belongs to the role coordinator."
    elif [[ $role != coordinator && $role != worker && -n $model ]]; then
        die 2 "--model belongs to the roles coordinator and worker."
    elif [[ $role != worker && $role != coordinator && -n $service ]]; then
        die 2 "--service and --uninstall-service belong to the roles worker and coordinator."
    fi
    [[ -z $service || -n ${HOME:-} ]] ||
        die 1 "HOME is not set, so there is no place for the service. Set it to your home folder."
    if [[ $role == worker && $service != uninstall && -z $coordinator && ! -e $config ]]; then
        if [[ -t 0 && -z $dry_run ]]; then
            read -r -p "What dllm token create printed (dllm://...): " coordinator
        else
            die 2 "A worker must know whom to join: add --coordinator dllm://..."
        fi
    fi
    if [[ $coordinator =~ $line ]]; then
        join_line=$coordinator
        coordinator=${BASH_REMATCH[1]}
    elif [[ $coordinator == dllm:* ]]; then
        die 2 "This is not all of the line that dllm token create prints; copy all of it."
    fi
    [[ -z $coordinator || $coordinator =~ $address ]] ||
        die 2 "$coordinator is no address. Write HOST:PORT, such as 192.168.1.100:5555."
    [[ -z $bind || $bind =~ $address ]] ||
        die 2 "$bind is no address. Write HOST:PORT, such as 0.0.0.0:5555."
    [[ -z $name || $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ ]] ||
        die 2 "The name $name will not do. Use up to 64 letters, digits, '.', '_' and '-'."
    if [[ $(uname -s) != "$os_name" ]]; then
        [[ -n $dry_run ]] || die 2 "This script is for $os_name, but this is $(uname -s)." \
            "Use the other script in setup_scripts."
    fi
}

# find_python: set `base_python`
find_python() {
    local candidate version seen=
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
            version=
        if [[ $version =~ ^3\.([0-9]+)$ && ${BASH_REMATCH[1]} -ge 11 ]]; then
            base_python=$candidate
            break
        elif [[ -n ${PYTHON:-} ]]; then
            die 1 "PYTHON is set to $PYTHON, which is ${version:+Python $version, }not Python 3.11 or newer."
        fi
        seen+=${version:+", $candidate is $version"}
    done
    [[ -n ${base_python:-} ]] || die 1 \
        "Python 3.11 or newer is needed, and none was found${seen:+ (${seen#, })}." \
        "$(python_hint)" \
        "If it is there under another name, say which: PYTHON=/path/to/python $0"
    "$base_python" -c 'import ensurepip, venv' 2>/dev/null || die 1 \
        "Python $version is there, but without its venv module, which makes folders of packages." \
        "$(venv_hint "$version")"
}

# The venv runs, and is still where it was made (its programs contain its path).
venv_works() {
    local made
    "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return
    made=$(grep '^command = ' "$venv/pyvenv.cfg") || return 0
    [[ $made == *"$venv" ]]
}

make_venv() {
    venv_works && return
    local clear=()
    find_python
    if [[ -e $venv ]]; then
        say "The folder .venv does not work any more (Python was replaced, or the folder was moved)."
        say "It is made anew."
        clear=(--clear)
    fi
    run "$base_python" -m venv ${clear[@]+"${clear[@]}"} "$venv"
}

install_package() {
    local extras=$1 fingerprint target=$root index=()
    fingerprint=$(LC_ALL=C && cat "$root/pyproject.toml" "$root/setup.py" "$root/constraints.txt" \
        "$root"/distributed_llm/worker/model/kernels/native/*.[ch] | cksum)
    if [[ -f $stamp ]] && venv_works; then
        case $(cat "$stamp") in
            "dev $fingerprint" | "$extras $fingerprint") return ;;
        esac
    fi
    make_venv
    # PyTorch first and by itself: it is by far the largest, and the only one with several builds.
    torch_note
    [[ -z ${DLLM_TORCH_INDEX_URL:-} ]] || index=(--extra-index-url "$DLLM_TORCH_INDEX_URL")
    pip_install ${index[@]+"${index[@]}"} torch
    [[ $extras == run ]] || target+="[dev]"
    pip_install --editable "$target"
    if [[ -z $dry_run ]]; then
        printf '%s\n' "$extras $fingerprint" >"$stamp"
        say "Installed into $venv."
    fi
}

pip_install() {
    run "$python" -m pip install --disable-pip-version-check --no-input \
        --constraint "$root/constraints.txt" "$@" || die 1 \
        "Installing the packages failed; pip says above why." \
        "No network or a full disk: mend that and run this again, it goes on where it stopped." \
        "No matching version: this Python may be too new for PyTorch; choose an older one of 3.11 or" \
        "newer, for example: rm -r .venv; PYTHON=python3.12 $0"
}

write_config() {
    local settings=()
    [[ ! -e $config ]] || return 0
    [[ -z $coordinator ]] || settings+=(--set "worker.coordinator=$coordinator")
    [[ -z $name ]] || settings+=(--set "worker.name=$name")
    [[ -z $model ]] || settings+=(--set "$role.model=$model")
    [[ -z $bind ]] || settings+=(--set "coordinator.bind=$bind")
    run "$python" -m distributed_llm.common.config_template "$config" \
        ${settings[@]+"${settings[@]}"}
}

# enrol: have the coordinator know this machine; a dry run prints no secret
enrol() {
    [[ -n $join_line ]] || return 0
    [[ -z $dry_run ]] || join_line="dllm://$coordinator/..."
    run "$venv/bin/dllm" join "$join_line" --enrol-only ${name:+--name "$name"} || exit
}

# set_command_line: what the role runs; what was given here goes before config/local.yaml
set_command_line() {
    command_line=("$venv/bin/dllm" "$role")
    case $role in
        test) command_line=("$python" -m pytest -n 2) ;;
        coordinator)
            [[ -z $model ]] || command_line+=("$model")
            command_line+=(--config "$config")
            [[ -z $bind ]] || command_line+=(--bind "$bind")
            ;;
        worker)
            command_line+=(--config "$config")
            [[ -z $coordinator ]] || command_line+=(--coordinator "$coordinator")
            [[ -z $name ]] || command_line+=(--name "$name")
            [[ -z $model ]] || command_line+=(--model "$model")
            [[ -z $service ]] || command_line+=(--wait)
            ;;
    esac
    command_line+=(${passed[@]+"${passed[@]}"})
}

install_service() {
    run "$venv/bin/dllm" service install "${command_line[@]:1}" || exit
    [[ -n $dry_run ]] || say_command
}

# say_command: what to type from now on
say_command() {
    say "The command is $(printf %q "$venv/bin/dllm"); see: $(printf %q "$venv/bin/dllm") --help"
    say "To have it as dllm in this shell: export PATH=$(printf %q "$venv/bin"):\$PATH"
}

# uninstall_service: removing one needs Python alone, so it works though .venv is gone
uninstall_service() {
    local remover=$python
    if ! venv_works; then
        find_python
        remover=$base_python
    fi
    run env PYTHONPATH="$root" "$remover" -m distributed_llm.services remove "$role" || exit
}

main() {
    parse_arguments "$@"
    check_arguments
    cd "$root"
    set_command_line
    if [[ $service == uninstall ]]; then
        uninstall_service
        return
    fi
    case $role in
        coordinator | worker)
            install_package run
            write_config
            enrol
            ;;
        demo) install_package run ;;
        *) install_package dev ;;
    esac
    if [[ $service == install ]]; then
        install_service
    elif [[ -n $role ]]; then
        [[ $role == demo || $role == test || -n $dry_run ]] ||
            say "Starting the $role. To have it start with this machine, add --service."
        run exec "${command_line[@]}"
    elif [[ -z $dry_run && -z ${MAKELEVEL:-} ]]; then # make goes on with something itself
        say_command
    fi
}
