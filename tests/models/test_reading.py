"""Small files of a model: what a library raises for them is one error, and nothing else is taken for that."""

import gc
import logging

import pytest

from llmtune.errors import LlmtuneError, ModelError, TokenizerError
from llmtune.models import read_config as reading

BAD_VOCABULARIES = [
    b"",
    b"{",
    b"[]",
    b"3",
    b"{}",
    b"\xff\xfe",
    b'{"model": 3}',
    b'{"model": {"type": "BPE", "merges": 1}}',
]


@pytest.mark.parametrize("content", BAD_VOCABULARIES)
def test_q8_a_damaged_tokenizer_is_one_error_that_names_its_folder(model_folder, content):
    (model_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=f"the tokenizer in {model_folder}") as caught:
        reading.read_fast_tokenizer(model_folder, "model.name")
    assert "\n" not in caught.value.problems[0].problem
    assert caught.value.problems[0].where == "model.name"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b'{"model_type": "nosuch"}', b'{"model_type": []}']
)
def test_q8_a_damaged_config_is_one_error_that_names_it(model_folder, content):
    (model_folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        reading.read_config(model_folder)
    assert caught.value.problems[0].where == str(model_folder / "config.json")


@pytest.mark.parametrize(
    "raised", [MemoryError, KeyboardInterrupt, type("Ours", (LlmtuneError,), {}), type("Unheard", (Exception,), {})]
)
def test_what_says_nothing_of_the_file_stays_what_it_is(raised):
    """Bare `Exception` is what the Rust library raises; a kind of its own is not."""

    def read():
        raise raised("other")

    with pytest.raises(raised):
        reading._call_library(read)


def test_the_libraries_are_quiet_inside_and_as_they_were_outside():
    logger = logging.getLogger("gguf.of_a_test")
    assert logger.isEnabledFor(logging.WARNING)  # which it remembers
    with reading.quiet_libraries(), reading.quiet_libraries():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert logger.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_left_as_it_was_found(on, model_folder):
    was_on = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with reading.garbage_collection_paused():
            assert not gc.isenabled()
        with pytest.raises(ModelError), reading.garbage_collection_paused():
            reading.read_config(model_folder / "nowhere")
        assert gc.isenabled() is on
    finally:
        (gc.enable if was_on else gc.disable)()
