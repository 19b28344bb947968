"""`model.pad_token` and `model.eos_token`: another pad and end token than the tokenizer's own."""

import pytest

from llmtune.config.layers import load_config, parse_config
from llmtune.config.process_options import Options
from llmtune.config.schema import ModelConfig
from llmtune.errors import TokenizerError
from llmtune.models.catalog import resolve
from llmtune.models.tokenizer import load_tokenizer
from llmtune.prepare import open_renderer, open_tokenizer


def test_the_named_tokens_replace_the_tokenizers_own_and_change_its_digest(tiny_model_folder):
    source, name = resolve(str(tiny_model_folder)), str(tiny_model_folder)
    own = load_tokenizer(source, ModelConfig(name=name))
    other = load_tokenizer(source, ModelConfig(name=name, pad_token="<|im_start|>", eos_token="<|endoftext|>"))
    assert (own.tokenizer.pad_token, own.tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (other.tokenizer.pad_token, other.tokenizer.eos_token) == ("<|im_start|>", "<|endoftext|>")
    assert own.digest != other.digest


def test_texts_end_with_the_named_token_and_generation_stops_at_it(tiny_model_folder, tmp_path):
    words = [f"model.name={tiny_model_folder}", "model.eos_token=<|endoftext|>", "data.train=[a.jsonl]"]
    config = load_config(None, overrides=words, environ={}).config
    loaded = open_tokenizer(config, resolve(str(tiny_model_folder)), Options())
    end = loaded.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end in open_renderer(config, loaded).stop_token_ids


@pytest.mark.parametrize("key", ["pad_token", "eos_token"])
def test_an_unknown_token_is_refused_with_the_nearest_and_the_way_to_add_it(key, tiny_model_folder):
    config = ModelConfig(name=str(tiny_model_folder), **{key: "<|im_ends|>"})
    with pytest.raises(TokenizerError, match="the tokenizer has no token") as refused:
        load_tokenizer(resolve(str(tiny_model_folder)), config)
    problem = refused.value.problems[0]
    assert problem.where == f"model.{key}"
    assert "`<|im_end|>`" in problem.fix
    assert "'adapter.train_tokens=[<|im_ends|>]'" in problem.fix
    added = load_tokenizer(resolve(str(tiny_model_folder)), config, new_tokens=["<|im_ends|>"])
    assert getattr(added.tokenizer, key) == "<|im_ends|>"


def test_the_names_of_other_toolkits_are_read():
    config = parse_config("pad_token: <pad>\neos_token: <|end|>\n").config
    assert (config.model.pad_token, config.model.eos_token) == ("<pad>", "<|end|>")


def test_new_tokens_are_for_full_tuning_too(tiny_model_folder):
    words = [f"model.name={tiny_model_folder}", "adapter.train_tokens=[<new>]"]
    config = load_config(None, overrides=words, environ={}).config
    assert config.adapter.method == "none"
    assert "<new>" in open_tokenizer(config, resolve(str(tiny_model_folder)), Options()).tokenizer.get_vocab()
