#!/usr/bin/env bash
# Builds the C library for processors and systems that this machine is not, and runs its tests on them by
# emulation: ARM with GCC and with Clang (qemu), plain C, and Windows (built only). On Debian, as root; it
# installs what it needs from there, and a Python with PyTorch for ARM in .cache/processors.
# Takes an hour on two cores: the tests run 20 times slower.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=$PWD/.cache/processors
native=distributed_llm/worker/model/kernels/native
flags=(-O3 -std=c11 -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -shared)
# The last release whose build for ARM on PyPI is for CPUs alone.
torch=torch==2.10.0
# What the tests below import, in the versions of .venv.
packages="annotated-doc annotated-types anyio certifi charset-normalizer click filelock fsspec gguf \
h11 hf-xet httpcore2 httpx2 huggingface-hub hypothesis idna iniconfig jinja2 markdown-it-py \
markupsafe mdurl mpmath msgspec networkx numpy packaging platformdirs pluggy \
prometheus-client protobuf psutil pydantic pydantic-core pydantic-settings pygments pytest \
pytest-timeout python-dotenv pyyaml pyzmq regex requests rich safetensors sentencepiece \
shellingham sortedcontainers sympy tokenizers tqdm transformers truststore typer \
typing-inspection typing-extensions urllib3"

products=(tests/model/test_native_products.py tests/model/test_kleidi.py)
tests=(tests/model/test_{attention,convolution,fast_norms,kv_8_bits,quantize,recorded_layers}.py
    tests/model/test_{recurrent_steps,sampler}.py)
# They compile with this machine's own compiler, so not for the emulated processor.
not_there=(--deselect tests/model/test_native_products.py::test_threads_of_a_library_without_gccs_functions
    --deselect tests/model/test_native_products.py::test_a_processor_without_such_instructions_has_no_library
    # Of weights near the least that float32 has torch makes other integers there than the C library; and
    # the sums by which a test cuts at top-p, of float32, differ by one token of 1,242.
    -k "not 1e-36-torch.float32-int4 and not large_vocabularies_lose_the_same_tokens")

say() { printf '\n== %s\n' "$*"; }

wanted=()
for pair in aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu qemu-aarch64:qemu-user debootstrap:debootstrap \
    clang:clang x86_64-w64-mingw32-gcc:gcc-mingw-w64-x86-64; do
    command -v "${pair%%:*}" >/dev/null || wanted+=("${pair##*:}")
done
if ((${#wanted[@]})); then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${wanted[@]}"
fi

if [[ ! -e $cache/installed ]]; then
    say "Python for ARM"
    rm -rf "$cache"
    mkdir -p "$cache"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1 bookworm "$cache/root"
    for package in "$cache"/root/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$cache/root"
    done
    platforms=()
    for version in 2014 _2_17 _2_26 _2_27 _2_28 _2_34; do
        platforms+=(--platform "manylinux${version}_aarch64")
    done
    # By name and without what they require: of that, pip would leave out what this processor needs not.
    .venv/bin/python -m pip freeze --exclude-editable | tr _ - |
        grep -iE "^(${packages// /|})==" >"$cache/packages.txt"
    .venv/bin/python -m pip install --quiet --target "$cache/packages" --only-binary=:all: --no-deps \
        --implementation cp --python-version 3.11 "${platforms[@]}" "$torch" -r "$cache/packages.txt"
    touch "$cache/installed"
fi

# Copies what is to be committed, and puts a library there: `tree NAME COMPILER FLAGS...`.
tree() {
    local folder=$cache/$1
    shift
    rm -rf "$folder"
    mkdir -p "$folder"
    git ls-files -co --exclude-standard | tar cf - -T - | tar xf - -C "$folder"
    "$@" "${flags[@]}" "$native"/*.c -o "$folder/$native/kernels.so"
}

on_arm() {
    (cd "$cache/$1" && shift && qemu-aarch64 -cpu max -L "$cache/root" -E OMP_NUM_THREADS=1 \
        -E PYTHONPATH="$PWD:$cache/packages" "$cache/root/usr/bin/python3.11" -m pytest -q \
        -p no:cacheprovider -o filterwarnings=default --timeout=0 "${not_there[@]}" "$@")
}

say "Windows, built by MinGW"
tree windows x86_64-w64-mingw32-gcc

say "Plain C, on this processor"
tree plain gcc -DPLAIN_C -fPIC
(cd "$cache/plain" && PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$OLDPWD/.venv/bin/python" -m pytest -q -n 0 \
    "${products[@]}" "${tests[@]}")

say "ARM, by Clang"
tree clang clang --target=aarch64-linux-gnu -fPIC
on_arm clang "${products[@]}"

say "ARM, by GCC"
tree gcc aarch64-linux-gnu-gcc -fPIC
on_arm gcc "${products[@]}" "${tests[@]}"
