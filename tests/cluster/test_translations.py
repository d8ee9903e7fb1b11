"""Texts from an encoder-decoder on real processes, held against transformers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from distributed_llm import DistributedClient, InvalidRequest, LocalCluster
from tests.encoder_decoders import build
from tests.unit.made_source_tokenizers import folder_of
from tests.warm import checked

TEXT = "Hello world, she doesn't jump."
HOW: dict[str, Any] = {"max_new_tokens": 16, "no_repeat_ngram_size": 1}


def test_a_translator_is_told_the_language(tmp_path: Path) -> None:
    made = folder_of("mbart50")
    tokenizer: Any = AutoTokenizer.from_pretrained(made)
    model: Any = build("mbart", vocab_size=len(tokenizer), decoder_start_token_id=2)
    model.save_pretrained(tmp_path)
    for name in ("sentencepiece.bpe.model", "tokenizer_config.json"):
        shutil.copy(made / name, tmp_path)

    def translated(language: str) -> str:
        first = tokenizer.convert_tokens_to_ids(language)
        source = tokenizer(TEXT, return_tensors="pt")
        ids = model.generate(**source, **HOW, num_beams=1, forced_bos_token_id=first)[0]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    with (
        LocalCluster(checked(tmp_path), workers=2, coordinator={"strategy": "even"}) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        wanted = translated("de_DE")
        assert client.generate(TEXT, forced_bos_token_id="de_DE", **HOW) == wanted
        assert wanted != translated("fr_XX")
        first = tokenizer.convert_tokens_to_ids("fr_XX")
        chunks = client.stream(TEXT, forced_bos_token_id=first, **HOW)
        assert "".join(chunk.text for chunk in chunks) == translated("fr_XX")
        tokenizer.src_lang = "fr_XX"
        languages: dict[str, Any] = {"source_language": "fr_XX", "target_language": "de_DE"}
        assert client.generate(TEXT, **languages, **HOW) == translated("de_DE") != wanted
        with pytest.raises(InvalidRequest, match="no language 'Klingon', which target_language"):
            client.generate(TEXT, target_language="Klingon")
        with pytest.raises(InvalidRequest, match="no token 'Klingon'"):
            client.generate(TEXT, forced_bos_token_id="Klingon")
        with pytest.raises(InvalidRequest, match="no embeddings here"):
            client.embed(TEXT)
