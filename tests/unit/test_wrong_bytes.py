"""Who gave wrong bytes of a tensor, found once the right ones are known."""

from pathlib import Path

from distributed_llm.weights.fetching.events import GRAIN_BYTES
from distributed_llm.weights.wrong_bytes import GrainRecord
from tests.unit.cache_parts import content

DATA = content(4 * GRAIN_BYTES + 10)


def test_only_who_gave_other_bytes_is_suspected(tmp_path: Path) -> None:
    record, file = GrainRecord(), tmp_path / "part"
    record.gave("pc", 0, 2 * GRAIN_BYTES)
    record.gave("mac", 2 * GRAIN_BYTES, 2 * GRAIN_BYTES)
    record.gave("nas", 4 * GRAIN_BYTES, 10)
    file.write_bytes(DATA[: GRAIN_BYTES + 5] + b"x" + DATA[GRAIN_BYTES + 6 : -1] + b"x")
    assert record.suspects(file) == (), "nothing was known to be wrong"
    record.was_wrong(file)
    record.gave("mac", 0, len(DATA))
    file.write_bytes(DATA)
    assert record.suspects(file) == ("pc", "nas")
