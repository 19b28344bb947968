import dataclasses

import pytest
import torch

from llmtune.adapters import attach
from llmtune.adapters.write import write_adapter
from llmtune.config.schema import AdapterConfig, ModelConfig
from llmtune.models.catalog import resolve
from llmtune.models.load import load_model
from llmtune.models.parameters import trained_parameters
from llmtune.models.tokenizer import load_tokenizer
from training_fixtures import _planned_bytes  # noqa: F401


def make_base(folder, tokenizer, *, kind="llama", tied=True, dtype=torch.float32, seed=0):
    """Save a random model of 2 layers x 32 with its tokenizer; logits of ordinary size, biases and norms that are not
    trivial.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            config = GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                bos_token_id=0,
                eos_token_id=2,
            )
            model = GPT2LMHeadModel(config)
        else:
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32,
                intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,  # noqa: E501
            )  # fmt: skip
            model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder, base, *, quantization="none", precision="fp32", size=0.1, **options):
    """Attach an adapter as training does, fill it with random weights, and write it as a run does; returns its folder."""  # noqa: E501
    config = AdapterConfig(method="lora", **({"r": 4, "alpha": 8.0} | options))
    model_config = ModelConfig(name=str(base), quantization=quantization)
    source = resolve(str(base))
    tokenizer = load_tokenizer(source, model_config, new_tokens=config.train_tokens).tokenizer
    loaded = load_model(
        source,
        model_config,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        trained="adapter",
        precision=precision,
        seed=1,
    )
    adapted, _ = attach.attach_adapter(loaded.model, config, seed=1, tokenizer=tokenizer)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in trained_parameters(adapted).values():
            parameter.add_(size * torch.randn_like(parameter))
    folder.mkdir()
    write_adapter(
        adapted, folder, tokenizer=tokenizer, stop_token_ids=(2,), base_digest=loaded.base_digest, base_name=str(base)
    )
    return folder


@dataclasses.dataclass
class Maker:
    folder: object
    tokenizer: object
    count: int = 0

    def path(self, name):
        self.count += 1
        return self.folder / f"{name}-{self.count}"

    def base(self, **options):
        return make_base(self.path("base"), self.tokenizer, **options)

    def adapter(self, base, **options):
        return make_adapter(self.path("adapter"), base, **options)


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    return Maker(tmp_path, tiny_tokenizer)
