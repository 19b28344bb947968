"""Secrets are never written; what only looks like one by its name is left alone."""

import pytest

from llmtune.common.secrets import find_secrets, redacted, redacted_command


@pytest.mark.parametrize(
    "value",
    [
        {"token": "canary"}, {"hub": {"api_key": "canary"}}, {"WANDB_API_KEY": "canary"}, {"password": "canary"},
        {"x": [{"client-secret": "canary"}]},
        "hf_canary0123456789abc", "see ghp_canary0123456789abcdefgh there", "sk-canary-0123456789abcdef", "https://user:canary@host/x",
        "Authorization: Bearer canary", {"AWS_SECRET_ACCESS_KEY": "canary"}, ("github_pat_canary_0123456789abc",),
        "-canary-of-the-environment-",
    ],
)  # fmt: skip
def test_a_secret_is_hidden_wherever_it_stands(value):
    assert "canary" not in str(redacted(value, environ={"MY_TOKEN": "canary-of-the-environment"}))


@pytest.mark.parametrize(
    "value",
    [
        {"tokenizer": "x", "max_new_tokens": 5, "parse_control_tokens": True, "eos_token": "</s>", "pad_token": "<pad>"},  # noqa: E501
        {"token": None, "api_key": ""}, "https://host/path", "a@b.c", {"git_revision": "9f22fe25957bf29eaa3b25b6ea47ba7151ace024"},  # noqa: E501
        {"author": "x", "monkey": "y", "tokens_per_second": 1.5}, [1, 2.5, None, True],
    ],
)  # fmt: skip
def test_what_is_no_secret_is_left_alone(value):
    assert redacted(value, environ={"MY_TOKEN": "short"}) == value


@pytest.mark.parametrize(
    "command", [["--token", "canary"], ["--token=canary"], ["hub.token=canary"], ["--wandb-api-key", "canary", "x"]]
)
def test_a_command_line_is_shown_without_its_secrets(command):
    shown = redacted_command(["llmtune", *command], environ={})
    assert "canary" not in str(shown)
    assert len(shown) == len(command) + 1


ENVIRONMENT = {
    "PASSWORD": "training", "HUB_TOKEN": "production", "GOOGLE_CREDENTIALS": "/tmp/keys/one2three4five.json",
    "STOP_TOKEN": "<|reserved_0x4a5b_token|>", "AUTH": "https://host/v1/a2b3c4d5e6f7", "PIN_SECRET": "20261121",
    "DB_PASSWORD": "training-run-number-7", "API_KEY": "Meta-Llama-3.1-8B-Instruct",
}  # fmt: skip
"""Variables with a secret's name whose values are words, places, numbers and names."""


@pytest.mark.parametrize(
    "value",
    [
        *ENVIRONMENT.values(), "a training run", "data/production/rows.jsonl", ("production", "training"), "custom-nano",  # noqa: E501
        "HuggingFaceTB/SmolLM2-135M", "runs/task-classification-of-sentences-0123456789abcdef", "sk-wikipedia-2024-instructions-large",  # noqa: E501
        "hf_instructiondatasets/rows.jsonl", "the Bearer of bad news", "9f22fe25957bf29eaa3b25b6ea47ba7151ace024", "https://host:8080/a@b",
        ("q_proj", "v_proj"), 16, None,
    ],
)  # fmt: skip
def test_a_run_is_not_refused_for_words_names_and_places(value):
    assert find_secrets({"key": value}, environ=ENVIRONMENT) == []


@pytest.mark.parametrize(
    "value", [value for name, value in ENVIRONMENT.items() if name not in {"DB_PASSWORD", "API_KEY"}]
)
def test_words_numbers_and_places_are_not_hidden_either(value):
    assert redacted({"notes": f"a {value} b"}, environ=ENVIRONMENT) == {"notes": f"a {value} b"}


@pytest.mark.parametrize(
    "value",
    [
        "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "canary5ecret0wandb0key",
        "3f2a9c1e-77b0-4d1c-9e52-0a1b2c3d4e5f",
        "dQ3/x9Kf+72mZp0LrT4w",
    ],
)
@pytest.mark.parametrize("shown", ["{}", "logged in with {}!", "x{}y"])
def test_a_run_is_refused_for_a_random_secret_of_the_environment(value, shown):
    text = shown.format(value)
    values = {"notes": text, "seed": 1, "tags": (1, text), "name": "a training run"}
    assert find_secrets(values, environ={"WANDB_API_KEY": value}) == ["notes", "tags"]
    assert find_secrets(values, environ={"WANDB_API_KEY": "", "NAME": value}) == []


def test_a_short_password_is_hidden_as_a_whole_word_only():
    environ = {"DB_PASSWORD": "hunter22"}
    assert redacted("hunter22, x=hunter22 and hunter22000", environ=environ) == "***, x=*** and hunter22000"
    assert find_secrets({"key": "hunter22"}, environ=environ) == []
