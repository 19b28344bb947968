"""Rows that several processes share: their parts are the row, and loss and gradients are those of the plain path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from gradient_helpers import adapted, difference, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config, DistributedConfig
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.devices import Devices, check_processes
from llmtune.engine.forward import build_engine
from llmtune.engine.objective import RowPart, flat_inputs, plain_nll_sum
from llmtune.engine.sequence_parallel import SharedRows
from llmtune.errors import ConfigError, ModelError
from llmtune.kernels.attention import segments_of
from rank_helpers import in_two_ranks

Build = Callable[..., Any]
CPU = torch.device("cpu")
LORA = AdapterConfig(method="lora", r=4, dropout=0.0)
CASES = (("llama-tied", LORA), ("gemma2", None), ("gpt2", None))
"""Grouped heads with adapters; windows and a bound of the scores; learned positions."""


def test_the_parts_of_a_row_are_the_row(flat: MicroBatch) -> None:
    """Every position and every trained token once; the last part is filled up with a document of its own."""
    whole, over_a_cut = flat_inputs(flat, CPU), 0
    tokens = whole.input_ids.shape[1]
    for count in (2, 3, 7):
        parts = [flat_inputs(flat, CPU, RowPart(number, count)) for number in range(count)]
        length = parts[0].input_ids.shape[1]
        assert length * count - tokens in range(count)
        for name in ("input_ids", "position_ids"):
            joined = torch.cat([getattr(part, name) for part in parts], dim=1)
            assert torch.equal(joined[:, :tokens], getattr(whole, name))
            assert not joined[:, tokens:].any()
        rows = [part.rows + number * length for number, part in enumerate(parts)]
        assert torch.equal(torch.cat(rows), whole.rows)
        for name in ("targets", "weights"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        boundaries = segments_of(whole.mask).boundaries()
        filled = (length * count,) if length * count > tokens else ()
        assert all(segments_of(part.mask).boundaries() == (*boundaries, *filled) for part in parts)
        over_a_cut += sum(int((part.rows == length - 1).sum()) for part in parts[:-1])
    assert over_a_cut, "no token is predicted over a cut"


def shared_in_two(work: Callable[[Devices], object]) -> None:
    """Run `work` in two processes that share each row."""

    def run() -> None:
        devices = Devices.from_environment(no_cuda=True, timeout_s=60)
        devices.share_rows(2, timeout_s=60)
        work(devices)
        devices.close()

    codes, said = in_two_ranks(run)
    assert codes == [0, 0], "\n".join(said)


def test_processes_that_share_rows_repeat_the_plain_loss_and_gradients(
    build_model: Build, arithmetic: Build, flat: MicroBatch, padded: MicroBatch
) -> None:
    """N15 over a cut inside a document: loss 1e-6, gradients 1e-5 relative, summed over both processes."""

    def compare(devices: Devices, name: str, adapter: AdapterConfig | None) -> None:
        plain, model = adapted(build_model(name), adapter), adapted(build_model(name), adapter)
        engine = build_engine(model, config=Config(), device=CPU, precision=arithmetic(), rows=SharedRows(devices))
        assert engine.layout == "flat", engine.decisions
        expected, expected_gradients = loss_and_gradients(plain, lambda: plain_nll_sum(plain, padded))
        found, own = loss_and_gradients(model, lambda: engine.nll_sum(flat))
        assert found != pytest.approx(expected, rel=0.01), "a process computes a part"
        assert devices.sum(found) == (pytest.approx(expected, rel=1e-6),), name
        gradients = {key: devices.sum_tensor(gradient) for key, gradient in own.items()}
        assert difference(gradients, expected_gradients) < 1e-5, name

    shared_in_two(lambda devices: [compare(devices, *case) for case in CASES])


def test_a_model_whose_rows_cannot_be_cut_is_refused_by_name(build_model: Build, arithmetic: Build) -> None:
    """Layers that mix positions elsewhere than in attention (short convolutions here), and heads that do not divide."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    mixing = transformers.Lfm2Config(
        **shape, intermediate_size=64, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    odd = transformers.LlamaConfig(**shape | {"num_attention_heads": 1}, intermediate_size=64, num_key_value_heads=1)

    def refuse(devices: Devices) -> None:
        for shape, error, text in (
            (mixing, ModelError, "Lfm2ForCausalLM needs whole rows"),
            (odd, ConfigError, "2 processes cannot share the 1 attention heads"),
        ):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(shape)
            with pytest.raises(error, match=text):
                build_engine(model, config=Config(), device=CPU, precision=arithmetic(), rows=SharedRows(devices))

    shared_in_two(refuse)


@pytest.mark.parametrize(("count", "started"), [("1", "1 process was started"), ("3", "3 processes were started")])
def test_processes_that_do_not_make_groups_are_refused(count: str, started: str) -> None:
    config = Config(distributed=DistributedConfig(sequence_parallel=2))
    check_processes(config, {"WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match=started):
        check_processes(config, {"WORLD_SIZE": count})
