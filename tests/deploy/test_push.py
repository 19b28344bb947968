"""Nothing leaves the machine unless it was asked for; no secret is printed."""

from __future__ import annotations

import pytest

from llmtune.cli.main import run
from llmtune.deploy import push as pushing
from llmtune.deploy.push import check_push, push
from llmtune.errors import MachineError, UsageError

TOKEN = "hf_" + "Ab1" * 10


class StandIn:
    """Keeps what it is asked for, and refuses on demand."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if self.error is not None:
                raise self.error

        return call


def test_a_folder_and_a_file_are_uploaded_into_a_private_repository(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"x")
    for result, method in ((tmp_path, "upload_folder"), (tmp_path / "m.gguf", "upload_file")):
        hub = StandIn()
        assert push(result, "me/model", hub=hub) == "https://huggingface.co/me/model"
        created, uploaded = hub.calls
        assert created == ("create_repo", ("me/model",), {"private": True, "exist_ok": True})
        assert uploaded[0] == method
        assert uploaded[2]["repo_id"] == "me/model"
        assert str(result) in uploaded[2].values()


def test_a_refusal_of_the_hub_is_said_without_the_token(tmp_path):
    hub = StandIn(error=ValueError(f"403 for Authorization: Bearer {TOKEN}"))
    with pytest.raises(MachineError, match="the hub did not take") as refusal:
        push(tmp_path, "me/model", hub=hub)
    assert TOKEN not in str(refusal.value)


def test_an_upload_that_cannot_succeed_is_refused_before_the_work(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push("me/model", offline=False)
    with pytest.raises(UsageError, match="--push opens a connection, and --offline forbids it"):
        check_push("me/model", offline=True)
    with pytest.raises(UsageError, match="`model` is no name of a repository"):
        check_push("model", offline=False)
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(UsageError, match="nobody is logged in"):
        check_push("me/model", offline=False)


def test_only_the_option_uploads(make, tmp_path, monkeypatch, capsys):
    """A mutant that uploads always, or before there is a result, is seen."""
    calls = []
    monkeypatch.setattr(pushing, "push", lambda result, repository: calls.append((result.is_dir(), repository)))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("llmtune.cli.merge.is_offline", lambda: False)
    base = make.base()
    assert run(["export", str(base), "--output", str(tmp_path / "one")]) == 0
    assert calls == []
    assert run(["export", str(base), "--output", str(tmp_path / "two"), "--push", "me/model"]) == 0
    assert calls == [(True, "me/model")]
    monkeypatch.setattr("llmtune.cli.merge.is_offline", lambda: True)
    assert run(["export", str(base), "--output", str(tmp_path / "three"), "--push", "me/model"]) == 2
    assert not (tmp_path / "three").exists()
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
