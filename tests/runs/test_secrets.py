"""Secrets are never written; what only looks like one by its name is left alone."""

import pytest

from llmtune.runs.secrets import redacted, redacted_command


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
        {"tokenizer": "x", "max_new_tokens": 5, "parse_control_tokens": True, "eos_token": "</s>", "pad_token": "<pad>"},
        {"token": None, "api_key": ""}, "https://host/path", "a@b.c", {"git_revision": "9f22fe25957bf29eaa3b25b6ea47ba7151ace024"},
        {"author": "x", "monkey": "y", "tokens_per_second": 1.5}, [1, 2.5, None, True],
    ],
)  # fmt: skip
def test_what_is_no_secret_is_left_alone(value):
    assert redacted(value, environ={"MY_TOKEN": "short"}) == value


@pytest.mark.parametrize("command", [["--token", "canary"], ["--token=canary"], ["hub.token=canary"], ["--wandb-api-key", "canary", "x"]])
def test_a_command_line_is_shown_without_its_secrets(command):
    shown = redacted_command(["llmtune", *command], environ={})
    assert "canary" not in str(shown)
    assert len(shown) == len(command) + 1
