"""Numbers in GGUF's blocks, against the decoders of the `gguf` package."""

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from distributed_llm.common.gguf_types import GGUF_BLOCKS, GgufScheme
from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker.model.quantized import gguf_rows
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.gguf import decode
from distributed_llm.worker.model.quantized.quantize import quantized
from distributed_llm.worker.model.quantized.rows import from_rows
from tests.gguf_models import random_blocks

ROWS, COLUMNS = 6, 512


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_every_kind_is_what_the_gguf_package_says_to_the_last_bit(kind: str) -> None:
    layout, theirs = GGUF_BLOCKS[kind], GGMLQuantizationType[kind]
    assert (layout.numbers, layout.nbytes) == GGML_QUANT_SIZES[theirs]
    blocks = random_blocks(kind, ROWS * COLUMNS // layout.numbers).reshape(ROWS, -1)
    expected = torch.from_numpy(dequantize(blocks, theirs))
    weight = decode(torch.from_numpy(blocks), kind)
    assert torch.equal(weight.dequantized(), expected)
    assert int(weight.codes.max()) < 1 << weight.bits
    form = GgufScheme(kind).form((ROWS, COLUMNS))
    assert form is not None
    assert weight.fits(form) == GgufScheme(kind).is_exact((ROWS, COLUMNS))
    stacked = decode(torch.from_numpy(blocks).view(2, 3, -1), kind)
    assert torch.equal(stacked.dequantized(), expected.view(2, 3, -1))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_a_quantised_matrix_is_read(kind: str) -> None:
    matrix = np.random.default_rng(7).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    blocks = quantize(matrix, GGMLQuantizationType[kind])
    read = decode(torch.from_numpy(blocks), kind).dequantized()
    assert float((read - torch.from_numpy(matrix)).abs().max()) < 0.4


@pytest.mark.parametrize(("kind", "form"), [("IQ3_S", WeightForm(4, 32)), ("IQ2_XS", INT8)])
def test_rows_are_made_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: str, form: WeightForm
) -> None:
    monkeypatch.setattr(gguf_rows, "_AT_ONCE", 4 * COLUMNS)
    blocks = torch.from_numpy(random_blocks(kind, ROWS * COLUMNS // 256)).view(2, ROWS // 2, -1)
    seen: list[AffineWeight] = []
    rows = gguf_rows.rows_of_blocks(blocks, kind, COLUMNS, form, seen.append)
    expected = decode(blocks, kind).dequantized()
    made = from_rows(rows, form).dequantized()
    assert [len(part.codes) for part in seen] == [4, 2]
    if form == INT8:
        expected = quantized(expected, form).dequantized()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-7)
