"""Memory of the model that answers are compared with."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from llmtune.config.process_options import Options
from llmtune.config.schema import Config
from llmtune.engine.preference import begins_anew, needs_reference, resolve_objective
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.load import choose_weight_dtype
from llmtune.models.read_config import quiet_libraries, read_config
from llmtune.models.scan import refuse_unsafe_folder
from llmtune.models.second_model import find_second_model
from llmtune.plan.meta_model import ModelSizes
from llmtune.prepare import Prepared

__all__ = ["reference_bytes"]


def reference_bytes(prepared: Prepared, config: Config, options: Options, precision: str, sizes: ModelSizes) -> int:
    """Bytes of the weights of the reference: a copy of those that are trained, a second model, or none.

    sizes: of the model that is trained.

    Raises ModelError and TokenizerError for a second model that cannot be compared with.
    """
    if config.objective.trains_head:
        return 0
    objective = resolve_objective(config.objective, new_adapter=begins_anew(config.adapter))
    if not needs_reference(objective):
        return 0
    source = find_second_model(objective, prepared.tokenizer.tokenizer, offline=options.offline)
    if source is None:
        return sizes.gradient_bytes if objective.reference == "start" else 0
    folder = local_folder(source, weights=False)
    refuse_unsafe_folder(folder, ignore_auto_map=may_ignore_auto_map(source))
    dtype, _ = choose_weight_dtype(config.model.dtype, trained=False, precision=precision)
    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(folder), dtype=dtype)
    return sum(weight.nbytes for weight in model.parameters())
