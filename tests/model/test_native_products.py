"""The C library multiplies the states that it rounds, with every set of instructions."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_llm.worker.model.kernels import native, orders
from distributed_llm.worker.model.kernels.choice import Kind
from distributed_llm.worker.model.kernels.layout import Kernel
from distributed_llm.worker.model.kernels.native import (
    Int4Blocks,
    Int8Blocks,
    JointProduct,
    library,
)
from distributed_llm.worker.model.kernels.native.experts import NativeWeight, experts_of
from distributed_llm.worker.model.kernels.native.norms import NormKind, rms_norm
from distributed_llm.worker.model.kernels.native.rows import native_rows, row_product

HERE = library.supported()[1:]

pytestmark = pytest.mark.skipif(not HERE, reason="the C library was not built here")

RUN = 64
"""States that are rounded together for products of 8 bits."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    yield
    native.instructions.cache_clear()


@pytest.fixture(params=[1, 2], ids="threads {}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rounded(states: Tensor, run: int) -> Tensor:
    """Return the states as they are multiplied, float64: a run to 8 bits of its largest."""
    numbers = torch.empty(states.shape, dtype=torch.float64)
    for start in range(0, states.shape[1], run):
        own = states[:, start : start + run].float()
        most = own.abs().amax(1, keepdim=True)
        codes = (own * (127 / most.clamp_min(1e-30))).round()
        numbers[:, start : start + run] = codes.double() * (most / 127).double()
    return numbers


def assert_product(actual: Tensor, states: Tensor, run: int, weight: Tensor) -> None:
    numbers = rounded(states, run)
    expected = numbers @ weight.double().T
    size = (numbers.abs() @ weight.double().abs().T).clamp_min(1e-12)
    bound = 1e-5 if states.dtype == torch.float32 else 5e-3
    assert actual.dtype == states.dtype
    assert float(((actual.double() - expected).abs() / size).max()) < bound


def states_of(rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    states = torch.randn(rows, inputs)
    states[:, 3] = 300.0  # makes its run coarse, but no other
    states[-1] = 0.0
    return states.to(dtype)


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "inputs"), [(300, 192), (64, 100), (7, 30), (1, 4)])
def test_int8(
    channels: int, inputs: int, dtype: torch.dtype, instructions: str, threads: int
) -> None:
    codes = torch.randint(-128, 128, (channels, inputs), dtype=torch.int8)
    scales = torch.rand(channels) * 0.1 + 0.01
    product = Int8Blocks(codes, scales, instructions).kernels()["native"]
    for rows in (1, 2, 3, 7, 40):
        states = states_of(rows, inputs, dtype)
        assert_product(product(states), states, RUN, codes * scales[:, None])


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_of_int8(dtype: torch.dtype, instructions: str, threads: int) -> None:
    """Computed otherwise than few, and the same to the last bit."""
    codes = torch.randint(-128, 128, (146, 620), dtype=torch.int8)
    scales = torch.rand(146) * 0.1 + 0.01
    product = Int8Blocks(codes, scales, instructions).kernels()["native"]
    states = states_of(150, 620, dtype)
    output = product(states)
    assert_product(output, states, RUN, codes * scales[:, None])
    assert torch.equal(output, torch.cat([product(few) for few in torch.split(states, 15)]))
    states[17, 400] = float("nan")
    assert product(states)[17].isnan().all()


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "inputs", "group"), [(300, 192, 64), (64, 96, 32), (7, 256, 128), (1, 8, 8)]
)
def test_int4(
    channels: int, inputs: int, group: int, dtype: torch.dtype, instructions: str, threads: int
) -> None:
    codes = torch.randint(0, 16, (channels, inputs), dtype=torch.uint8)
    scales = (torch.rand(channels, inputs // group) * 0.1 + 0.01).half().float()
    offsets = (-scales * torch.randint(0, 16, scales.shape)).half().float()
    product = Int4Blocks(codes, scales, offsets, instructions).kernels()["native"]
    weight = codes.view(channels, -1, group) * scales[..., None] + offsets[..., None]
    for rows in (1, 2, 3, 7, 40):
        states = states_of(rows, inputs, dtype)
        assert_product(product(states), states, group, weight.flatten(1))


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize(("channels", "inputs"), [(300, 192), (64, 100), (7, 30), (1, 1100)])
def test_rows_of_bfloat16(channels: int, inputs: int, instructions: str, threads: int) -> None:
    """With a bias and without; a row comes out the same whatever stands beside it."""
    weight, bias = torch.randn(channels, inputs).bfloat16(), torch.randn(channels).bfloat16()
    states = torch.randn(101, inputs).bfloat16()
    size = states.double().abs() @ weight.double().abs().T + 1
    for given in (None, bias):
        expected = states.double() @ weight.double().T + (0 if given is None else given.double())
        alone = [row_product(row[None], weight, given, instructions) for row in states[:12]]
        for rows in (1, 2, 3, 4, 7, 101):
            output = row_product(states[:rows], weight, given, instructions)
            assert output.dtype == torch.bfloat16
            assert float(((output.double() - expected[:rows]).abs() / size[:rows]).max()) < 5e-3
            assert torch.equal(output[:12], torch.cat(alone[:rows]))


def test_numbers_of_another_dtype_are_not_multiplied_row_by_row() -> None:
    with pytest.raises(library.Missing):
        row_product(torch.ones(1, 8), torch.ones(4, 8), None)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("form", ["int8", "int4", "rows"])
def test_rows_that_choose_their_weights(form: str, tokens: int, threads: int) -> None:
    """Each choice is the product with that weight alone, to the last bit."""
    makers: dict[str, Callable[[Tensor], tuple[NativeWeight | None, Kernel]]] = {
        "int8": lambda codes: native_and_kernel(Int8Blocks(codes, torch.rand(40))),
        "int4": lambda codes: native_and_kernel(
            Int4Blocks((codes & 15).view(torch.uint8), torch.rand(40, 3), -torch.rand(40, 3))
        ),
        "rows": lambda codes: rows_and_kernel(codes.bfloat16(), torch.randn(40).bfloat16()),
    }
    codes = [torch.randint(-127, 128, (40, 192), dtype=torch.int8) for _ in range(6)]
    natives, kernels = zip(*map(makers[form], codes), strict=True)
    experts = experts_of(natives)
    assert experts is not None
    states = torch.randn(tokens, 192).bfloat16()
    chosen = torch.rand(tokens, 6).argsort(-1)[:, :3]
    together = experts.products(states, chosen.flatten()).view(tokens, 3, 40)
    for token, row in enumerate(chosen.tolist()):
        for place, weight in enumerate(row):
            assert torch.equal(
                together[token, place], kernels[weight](states[token : token + 1])[0]
            )
    assert experts.products(states, torch.full((tokens,), 6)).isnan().all()  # there are but 6


def native_and_kernel(blocks: Int8Blocks | Int4Blocks) -> tuple[NativeWeight | None, Kernel]:
    return blocks.native_weight, blocks.kernels()["native"]


def rows_and_kernel(weight: Tensor, bias: Tensor) -> tuple[NativeWeight | None, Kernel]:
    return native_rows(weight, bias), lambda states: row_product(states, weight, bias)


def test_states_of_another_width_are_refused() -> None:
    """C would read or write beyond the memory of the smaller one."""
    weight = torch.randn(16, 64).bfloat16()
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    pairs = torch.ones(16, 2)
    int8 = Int8Blocks(codes.view(torch.int8), torch.ones(16)).kernels()["native"]
    int4 = Int4Blocks(codes, pairs, pairs).kernels()["native"]
    experts = experts_of([native_rows(weight, None)] * 2)
    assert experts is not None
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda states: row_product(states, weight, None),
        lambda states: rms_norm(states, weight[0], 1e-6, NormKind.PLUS_ONE),
        lambda states: experts.products(states, torch.tensor([0, 1])),
        *(int8, int4),
    ]
    for call in calls:
        call(torch.randn(2, 64).bfloat16())
        for width in (32, 128):
            with pytest.raises(ValueError, match=f"states of {width} numbers"):
                call(torch.randn(2, width).bfloat16())


def test_weights_of_two_sizes_are_not_chosen_among() -> None:
    first = Int8Blocks(torch.ones(16, 64).char(), torch.ones(16)).native_weight
    other = Int8Blocks(torch.ones(32, 64).char(), torch.ones(32)).native_weight
    assert experts_of([first, other]) is None
    assert experts_of([first, None]) is None
    assert Int8Blocks(torch.ones(16, 30).char(), torch.ones(16)).native_weight is None


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_scales_that_float16_has_no_room_for(size: float) -> None:
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    scales = (torch.rand(32, 2) * 0.1 + 0.01).half().float() * size
    product = Int4Blocks(codes, scales, -8 * scales).kernels()["native"]
    states = torch.randn(3, 64)
    weight = (codes.view(32, 2, 32) - 8.0) * scales[..., None]
    numbers = rounded(states, 32)
    expected = numbers @ weight.flatten(1).double().T
    wrong = (product(states).double() - expected).norm() / expected.norm()
    assert float(wrong) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("instructions", HERE)
def test_a_state_that_is_no_number_spoils_its_own_row_only(bad: float, instructions: str) -> None:
    codes = torch.randint(-128, 128, (32, 128), dtype=torch.int8)
    product = Int8Blocks(codes, torch.ones(32), instructions).kernels()["native"]
    states = torch.randn(5, 128)
    good = product(states)
    states[2, 70] = bad
    output = product(states)
    assert output[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(output[others], good[others])


@pytest.mark.parametrize("rows", [1, 5, 19])
@pytest.mark.parametrize("instructions", HERE)
def test_products_with_the_same_states_in_one_call(
    rows: int, instructions: str, threads: int
) -> None:
    """To the last bit; one fills no whole block, one has fewer than are taken at once."""
    for dtype in (torch.float32, torch.bfloat16):
        states = states_of(rows, 192, dtype)
        int8, int4 = [], []
        for channels in (150, 16, 301):
            codes = torch.randint(-127, 128, (channels, 192), dtype=torch.int8)
            int8.append(Int8Blocks(codes, torch.rand(channels), instructions))
            scales = torch.rand(channels, 3)
            int4.append(Int4Blocks((codes & 15).view(torch.uint8), scales, -scales, instructions))
        for weights in (int8, int4):
            assert len({weight.alike for weight in weights}) == 1
            together = JointProduct(weights)(states)
            for product, weight in zip(together, weights, strict=True):
                assert torch.equal(product, weight.kernels()["native"](states))
    assert int8[0].alike != int4[0].alike


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    codes = torch.randint(0, 16, (80, 128), dtype=torch.uint8)
    scales = torch.rand(80, 2) * 0.1
    product = Int4Blocks(codes, scales, -8 * scales).kernels()["native"]
    states = torch.randn(23, 128)
    assert torch.equal(product(states)[17:18], product(states[17:18]))


def test_the_usual_order_is_that_of_the_library_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert orders.usual(Kind("int4", "", "large")).order == "blocks"
    monkeypatch.setattr(library, "_library", lambda: None)
    native.instructions.cache_clear()
    assert native.instructions() == "none"
    assert orders.usual(Kind("int4", "", "large")).order != "blocks"
    with pytest.raises(library.Missing):
        Int8Blocks(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16))


@pytest.mark.parametrize(
    ("machine", "kernel"), [("x86_64", "linear"), ("aarch64", "native"), ("arm64", "native")]
)
def test_single_tokens_usually_take_the_library_on_arm(
    machine: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of floating-point weights too: only then are layers recorded."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert orders.usual(Kind("float", "bfloat16", "large")).kernels[0] == kernel


@pytest.mark.parametrize(
    ("torch_has", "supported", "used"),
    [
        ("AVX512", ("none", "avx2", "avxvnni", "avx512vnni"), "avx512vnni"),
        ("AVX2", ("none", "avx2", "avxvnni", "avx512vnni"), "avxvnni"),
        ("AVX2", ("none", "avx2", "avx512vnni"), "avx2"),
        ("DEFAULT", ("none", "avx2", "avx512vnni"), "none"),
        ("DEFAULT", ("none", "neon", "dotprod"), "dotprod"),  # what torch says on ARM
        ("DEFAULT", ("none", "plain"), "plain"),
    ],
)
def test_instructions_that_torch_may_not_use_are_not_used_either(
    torch_has: str, supported: tuple[str, ...], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_has)
    monkeypatch.setattr(library, "supported", lambda: supported)
    native.instructions.cache_clear()
    assert native.instructions() == used


def test_the_sets_of_instructions_are_numbered_as_in_c() -> None:
    header = (Path(library.__file__).parent / "processor.h").read_text()
    (names,) = re.findall(r"enum \{ (.*), SETS \};", header)
    assert tuple(name.lower() for name in names.split(", ")) == library.NAMES


def test_without_torchs_threads_the_library_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute with one thread, and measurements, which have one too, would not tell."""
    monkeypatch.setattr(library, "_threads", lambda: None)
    assert library._library.__wrapped__() is None


def test_without_a_compiler_torchs_kernels_are_used_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_FILE", tmp_path / "kernels.so")
    assert library._library.__wrapped__() is None
    assert "no C compiler" in caplog.text


OPENMP = """
#include <stdint.h>
typedef void Forked(int32_t *, int32_t *, void *, void *);
int32_t pushed, forks;
int32_t __kmpc_global_thread_num(const void *place) { return place ? 7 : 0; }
void __kmpc_push_num_threads(const void *place, int32_t thread, int32_t threads)
{
    pushed = place && thread == 7 ? threads : -1;
}
void __kmpc_fork_call(const void *place, int32_t count, Forked *forked, void *first, void *second)
{
    for (int32_t n = 0; place && count == 2 && n < pushed; n++, forks++)
        forked(&n, &n, first, second);
}
"""
"""What OpenMP libraries have that have no GOMP_parallel: those of Windows."""


def test_threads_of_a_library_without_gccs_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, built = tmp_path / "omp.c", tmp_path / "libiomp5md.so"
    source.write_text(OPENMP)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", built], check=True)
    monkeypatch.setattr(library, "_loaded", lambda maps: [])
    monkeypatch.setattr(library, "_beside_torch", lambda: [str(tmp_path / "none"), str(built)])
    threads = library._threads()
    assert threads is not None
    assert len(threads) == 3
    own = shutil.copy(library._FILE, tmp_path / "kernels.so")  # with functions of its own
    opened = library._opened(Path(own), threads)
    assert opened is not None
    states, weight = torch.randn(64, 1024).bfloat16(), torch.randn(1024).bfloat16()
    output = torch.zeros_like(states)
    addresses = states.data_ptr(), output.data_ptr(), weight.data_ptr()
    opened.rms_norm(*addresses, 64, 1024, 1e-6, NormKind.PLUS_ONE.value, 3)
    assert torch.equal(output, rms_norm(states, weight, 1e-6, NormKind.PLUS_ONE))
    openmp = ctypes.CDLL(str(built))
    assert ctypes.c_int32.in_dll(openmp, "pushed").value == 3
    assert ctypes.c_int32.in_dll(openmp, "forks").value == 3


def test_openmp_libraries_that_are_loaded(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 12      /opt/a b/libgomp-24e2ab19.so.1.0.0\n"
        "7f01-7f02 r--p 00000000 08:01 12      /opt/a b/libgomp-24e2ab19.so.1.0.0\n"
        "7f02-7f03 r-xp 00000000 08:01 13      /usr/lib/libcomposite.so\n"
        "7f03-7f04 rw-p 00000000 00:00 0\n"
        "7f04-7f05 r-xp 00000000 08:01 14      /env/lib/libiomp5.so\n"
    )
    assert library._loaded(maps) == ["/env/lib/libiomp5.so", "/opt/a b/libgomp-24e2ab19.so.1.0.0"]
    assert library._loaded(tmp_path / "none") == []


def test_a_processor_without_such_instructions_has_no_library(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Such as one of Intel's or AMD's without AVX2; nobody has to be told."""
    source = tmp_path / "none.c"
    source.write_text("int has_instructions(int number) { return number < 0; }\n")
    built = tmp_path / "none.so"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", built], check=True)
    assert library._opened(built, [0]) is None
    assert not caplog.records
    assert library._opened(source, [0]) is None
    assert "Install this package again" in caplog.text
