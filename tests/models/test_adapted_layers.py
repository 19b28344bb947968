"""Which layers get an adapter: our keys beside peft's own rules, on a model of four blocks; and their plan."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmtune.adapters.attach import attach_adapter
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.config.schema import AdapterConfig
from llmtune.errors import AdapterError
from llmtune.models.read_config import quiet_libraries
from llmtune.plan import forecast
from llmtune.plan.forecast import Forecaster
from llmtune.plan.hardware import find_target
from llmtune.prepare import prepare

BLOCKS = 8


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_tokenizer):
    """A Llama of 8 blocks x 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("eight")
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


def adapted(model):
    """Name of each layer with LoRA -> (rank, scaling)."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


ROWS = [
    ({"target_modules": ("q_proj", "down_proj")}, {"target_modules": ["q_proj", "down_proj"]}),
    ({"target_modules": r".*layers\.(1|2)\..*q_proj"}, {"target_modules": r".*layers\.(1|2)\..*q_proj"}),
    ({"target_modules": ("model.layers.5.self_attn.q_proj",)}, {"target_modules": ["model.layers.5.self_attn.q_proj"]}),
    ({"target_modules": ("layers.2.mlp.up_proj", "v_proj")}, {"target_modules": ["layers.2.mlp.up_proj", "v_proj"]}),
    ({"exclude_modules": ("q_proj",)}, {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    ({"exclude_modules": r".*\.7\..*"}, {"target_modules": "all-linear", "exclude_modules": r".*\.7\..*"}),
    ({"target_modules": ("q_proj",), "layers": 3}, {"target_modules": ["q_proj"], "layers_to_transform": [5, 6, 7]}),
    ({"target_modules": r".*k_proj", "layers": 1}, {"target_modules": ["k_proj"], "layers_to_transform": [7]}),
    ({"rank_pattern": {"q_proj": 2}}, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}),
    (
        {"rank_pattern": {r"layers\.[0-3]\.mlp\.up_proj": 2}, "alpha_pattern": {"up_proj": 5.0}},
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.[0-3]\.mlp\.up_proj": 2},
            "alpha_pattern": {"up_proj": 5.0},
        },
    ),
]
"""(our keys, peft's options for the same layers, ranks and scales)"""


@pytest.mark.parametrize(("keys", "options"), ROWS)
def test_the_layers_ranks_and_scales_are_those_of_peft(keys, options, model, model_folder):
    from transformers import AutoModelForCausalLM

    ours, _ = attach_adapter(model, AdapterConfig(method="lora", r=4, alpha=8.0, **keys), seed=0)
    with quiet_libraries():
        theirs = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_folder),
            LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options),
        )
    assert adapted(ours) == adapted(theirs)
    assert 0 < len(adapted(ours)) <= 7 * BLOCKS


@pytest.mark.parametrize(
    ("keys", "says", "fix"),
    [
        ({"target_modules": r".*layers\.9\..*q_proj"}, "no layer's full name matches", "model.layers.0.self_attn"),
        ({"target_modules": (r".*\.1\..*q_proj",)}, "no layer is called", r"'adapter.target_modules=.*\.1\..*q_proj'"),
        ({"target_modules": r".*layers\.2\..*"}, "a LlamaAttention, which is no layer", "end with names of layers"),
        ({"target_modules": ("self_attn",)}, "no layer with a weight", "k_proj, o_proj, q_proj, v_proj"),
        ({"target_modules": ("model.layers.9.self_attn.q_proj",)}, "no layer is called", "did you mean `q_proj`"),
        ({"exclude_modules": ("lm_head",)}, "leaves nothing out", "targeted are down_proj"),
        ({"exclude_modules": "q_proj"}, "leaves nothing out", "regular expression over full names"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "no layer is left", "leave one of them out"),
        ({"layers": 9}, "the model has 8 blocks", "adapter.layers=8"),
        ({"rank_pattern": {"qproj": 4}}, "no adapted layer is called `qproj`", "adapted are down_proj"),
        ({"rank_pattern": {"q_proj": 0}}, "`q_proj: 0` is not above 0", "above 0"),
        ({"alpha_pattern": {"(": 4}}, "no regular expression", "end of a name"),
        ({"modules_to_save": ("layers.9.mlp",)}, "no module is called", "did you mean `mlp`"),
        ({"target_modules": ("all-linear", "lm_head")}, "stands alone", "adapter.target_modules=[q_proj,k_proj,"),
        ({"target_modules": "(q|v)_proj"}, "full name matches", "'adapter.target_modules=.*(q|v)_proj'"),
        ({"target_modules": ("*.q_proj",)}, "no layer is called", "'adapter.target_modules=.*.q_proj'"),
        ({"target_modules": "*q_proj"}, "no regular expression", "'adapter.target_modules=.*q_proj'"),
        ({"target_modules": ("norm",)}, "no layer with a weight", "name layers: down_proj, gate_proj"),
        ({"target_modules": "q_proj|v_proj"}, "full name matches", "'adapter.target_modules=.*q_proj|.*v_proj'"),
        (
            {"target_modules": ".*q_proj|v_proj"},
            "matches `v_proj`, a part of",
            "'adapter.target_modules=.*q_proj|.*v_proj'",
        ),
        ({"target_modules": ".*q_proj|.*nosuch"}, "matches `.*nosuch`, a part of", "take that part out"),
        ({"target_modules": "q_proj v_proj"}, "no full name matches", "'adapter.target_modules=[q_proj,v_proj]'"),
        ({"target_modules": ".*(q|v"}, "no regular expression", "close its brackets"),
    ],
)
def test_what_matches_no_layer_is_refused_with_what_to_write(keys, says, fix, model):
    with pytest.raises(AdapterError, match=says) as refused:
        attach_adapter(model, AdapterConfig(method="lora", **keys), seed=0)
    assert fix in (refused.value.problems[0].fix or "")


# --- the plan


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": "the user asks" * (1 + at), "completion": " words of the assistant"} for at in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PLANNED = {
    "a pattern without block 0": (r"adapter.target_modules='.*layers\.(1|2)\..*q_proj'",),
    "the last blocks": ("adapter.layers=3",),
    "a saved layer of one block": ("adapter.modules_to_save=[layers.6.mlp.up_proj]", "adapter.target_modules=[q_proj]"),
}


def forecaster_of(model_folder, rows_file, *overrides):
    words = [
        f"model.name={model_folder}", f"data.train={rows_file}", "adapter.method=lora", "adapter.r=4",
        "training.precision=fp32", "training.batch_size=4", *overrides,
    ]  # fmt: skip
    resolved = load_config(None, overrides=words, environ={})
    return Forecaster(prepare(resolved, Options()), Options(), find_target(None, no_cuda=True))


@pytest.mark.parametrize("what", PLANNED)
def test_the_plan_of_chosen_layers_is_that_of_the_whole_model(what, model_folder, rows_file, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMTUNE_CACHE_DIR", str(tmp_path / "cache"))
    forecaster = forecaster_of(model_folder, rows_file, *PLANNED[what])
    config = forecaster.config
    batch, _ = forecaster.largest_micro_batch(config)
    model = forecaster._build(config)
    assert forecaster.sizes(config).trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = forecaster._trace(config, batch, "single")
    monkeypatch.setattr(forecast, "TRACED_BLOCKS", BLOCKS)  # then all blocks are traced, and none stands in
    whole = forecaster._trace(config, batch, "single")
    assert planned.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.1)
    assert planned.activation_bytes == pytest.approx(whole.activation_bytes, rel=0.15)


def test_blocks_below_the_first_adapted_one_keep_nothing(model_folder, rows_file):
    few, all_blocks = (
        forecaster_of(model_folder, rows_file, f"adapter.layers={count}", "adapter.target_modules=[q_proj,down_proj]")
        for count in (2, 8)
    )
    batch, _ = few.largest_micro_batch(few.config)
    small, large = (each.peaks(each.config, batch, "single").activation_bytes for each in (few, all_blocks))
    assert small < 0.5 * large
    assert torch.get_num_threads() == 1


# --- first values


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_first_values_are_drawn_as_peft_draws_them_and_change_no_output(init, model, model_folder):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        ours, _ = attach_adapter(model, AdapterConfig(method="lora", r=16, init=init), seed=0)
        assert float((ours(ids).logits - before).abs().max()) < 1e-5
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_folder),
            LoraConfig(
                task_type="CAUSAL_LM", r=16, target_modules="all-linear",
                init_lora_weights=True if init == "kaiming" else init,
            ),
        )  # fmt: skip
    for part in ("lora_A.default.weight", "lora_B.default.weight"):
        spreads = [
            torch.cat([p.detach().flatten() for name, p in each.named_parameters() if name.endswith(part)]).std()
            for each in (ours, theirs)
        ]
        assert float(spreads[0]) == pytest.approx(float(spreads[1]), rel=0.05)
        assert (float(spreads[0]) == 0) == (init != "orthogonal" and "lora_B" in part)


def test_an_orthogonal_pair_needs_an_even_rank(model):
    with pytest.raises(AdapterError, match="needs an even rank"):
        attach_adapter(model, AdapterConfig(method="lora", r=3, init="orthogonal"), seed=0)
