"""What a coordinator says of the model that it serves."""

import logging
from pathlib import Path

import pytest

from tests.encoder_decoders import make
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import on_loop


@on_loop
async def test_encoder_decoders_are_not_said_to_be_without_tests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with coordinator(model=str(make(tmp_path, "t5"))):
        assert "serving" in caplog.text
        assert "no test covers" not in caplog.text
