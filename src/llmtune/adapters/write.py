"""Write a LoRA adapter in the format of peft, so that `PeftModel.from_pretrained` reads it.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmtune import durable
from llmtune.adapters.config_file import BASE_RECORD, WEIGHTS_FILE, BaseRecord, DtypeName
from llmtune.adapters.residual_base import TakenPart
from llmtune.models.parameters import base_model_of, find_score_head
from llmtune.models.read_config import quiet_libraries
from llmtune.models.save import write_generation_config, write_tokenizer
from llmtune.models.score_head import labels_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

__all__ = ["adapter_state_and_config", "write_adapter"]


def write_adapter(
    model: PeftModel,
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stop_token_ids: Sequence[int] = (),
    base_digest: str | None = None,
    base_name: str | None = None,
    base_revision: str | None = None,
    taken: TakenPart | None = None,
) -> None:
    """Write the adapter, a record of its base, and the tokenizer with generation config when one is given.

    The adapter's config names the base as transformers can load it (a hub id or a folder). The format is peft's:
    https://huggingface.co/docs/peft/developer_guides/checkpoint

    tensors: those of `adapter_state_and_config(model)`, A [r, in] and B [out, r] of each layer, where they were
    gathered already. base_digest, base_name, base_revision: written to the record, and the revision to the config too.

    taken: what was taken out of the base in memory; written, the adapter fits the base on the disk.

    Raises MachineError when the system refuses to write.
    """
    own_tensors, config = adapter_state_and_config(model)
    tensors = own_tensors if tensors is None else tensors
    if taken is not None:
        tensors, config = taken.as_lora(tensors), taken.config_as_lora(config)
    if base_revision is not None:
        config["revision"] = base_revision
    durable.write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    durable.write_json(folder / "adapter_config.json", config)
    base = base_model_of(model)
    # A merge needs the very numbers the adapter was trained beside: the type they were loaded in, and how quantized.
    stored = getattr(base.config, "quantization_config", None)
    record = BaseRecord(
        base_digest=base_digest,
        base_name=base_name,
        base_path=cast("str | None", config["base_model_name_or_path"]),
        base_revision=base_revision,
        quantization=None if stored is None else "4bit" if getattr(stored, "load_in_4bit", False) else "8bit",
        dtype=None if base.config.dtype is None else cast("DtypeName", str(base.config.dtype).removeprefix("torch.")),
    )
    if find_score_head(base) is not None:
        record["labels"] = [*labels_of({**base.config.to_dict(), "architectures": [type(base).__name__]})]
    durable.write_json(folder / BASE_RECORD, record)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
        write_generation_config(base, tokenizer, stop_token_ids, folder)


def adapter_state_and_config(model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return the adapter's tensors and config as peft's files hold them.

    https://huggingface.co/docs/peft/developer_guides/checkpoint

    Tensors (A [r, in] and B [out, r] of each layer, DoRA's magnitudes [out], trained rows) are on the CPU, contiguous
    and in the order of their names; the config holds JSON values.
    """
    from peft import get_peft_model_state_dict

    with quiet_libraries():
        # By default peft also saves the base's embedding when it was resized, and asks a hub whether it was.
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True  # as peft's own save_pretrained writes it: a loaded adapter is frozen
    return tensors, {key: _as_json(config[key]) for key in sorted(config) if key != "runtime_config"}


def _as_json(value: object) -> object:
    """Return a JSON value with one spelling: sets and tuples as lists, enums as their value."""
    if isinstance(value, (set, frozenset)):
        # peft keeps names in sets, whose order is another in each process: the file would never be the same twice.
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in sorted(value.items())}
    return getattr(value, "value", value)
