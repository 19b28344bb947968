"""A GPU's kernels without a GPU, in a process of its own: `python kernels_trial.py interpret|model|compile`.

Prints JSON. `interpret` and `model` are in float32, by Triton's interpreter: how far Liger's operators are from plain
torch, and how far loss and gradient of a small model are from the library's own with each kernel of the table, each way
of attention, and all of it. `compile`: bytes of shared memory of each kernel by compute capability.
"""

import json
import os
import sys
from functools import partial

if sys.argv[1:] in (["interpret"], ["model"]):
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch.nn import functional

from llmtune.kernels.liger import LIGER

OPS = torch.ops.llmtune


def apart(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Scalar(float):
    """A number with the method that compiled code has on one, and the interpreter has not."""

    def to(self, _dtype):
        return self


def swiglu():
    from liger_kernel.ops import swiglu as module

    module.float = Scalar
    gate, up, grad = (torch.randn(1, 20, 300) for _ in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    expected = functional.silu(leaves[0]) * leaves[1]
    expected.backward(grad)
    output = OPS.swiglu(gate, up)
    OPS.swiglu_backward_(grad, gate, up)
    return max(apart(output, expected.detach()), apart(gate, leaves[0].grad), apart(up, leaves[1].grad))


def rotary():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from llmtune.kernels.rotary import _rotate

    angles = torch.randn(1, 12, 8)
    cos, sin = (torch.cat([one, one], dim=-1) for one in (angles.cos(), angles.sin()))
    made = [torch.randn(1, 12, heads, 16).requires_grad_() for heads in (6, 2)]
    ways = []
    for rotate in (apply_rotary_pos_emb, lambda *inputs: _rotate(apply_rotary_pos_emb, *inputs)):
        leaves = [one.detach().clone().requires_grad_() for one in made]
        outputs = rotate(*((one * 1).transpose(1, 2) for one in leaves), cos, sin)
        (outputs[0].square().sum() + outputs[1].sin().sum()).backward()
        ways.append([*outputs, *(one.grad for one in leaves)])
    return max(apart(found.detach(), expected.detach()) for found, expected in zip(ways[1], ways[0], strict=True))


def cross_entropy():
    """Without a bound on logits: of a number that is an argument the interpreter makes no tensor."""
    logits, targets = 4 * torch.randn(17, 531), torch.randint(531, (17,))
    leaf = logits.clone().requires_grad_()
    expected = functional.cross_entropy(leaf, targets, reduction="none")
    expected.sum().backward()
    nll = OPS.cross_entropy_(logits, targets, None, True)
    return max(apart(nll, expected.detach()), apart(logits, leaf.grad))


def head():
    """The whole loss through our chunks, beside the same without the kernel."""
    from llmtune.kernels import linear_cross_entropy as module

    linear = torch.nn.Linear(24, 531, bias=False)
    rows, targets, weights = torch.randn(300, 24), torch.randint(531, (300,)), torch.rand(300)
    found = []
    for in_place in (False, True):
        leaf = rows.clone().requires_grad_()
        linear.zero_grad()
        loss = module.head_nll_sum(module.Head(linear, scale=0.7, in_place=in_place), leaf, targets, weights)
        loss.backward()
        found.append([loss.detach().view(1), leaf.grad, linear.weight.grad.clone()])
    return max(apart(one, other) for one, other in zip(found[1], found[0], strict=True))


KERNELS = ("SwiGLU by Liger", "rotary positions by Liger", "cross-entropy by Liger", "RMS norm", "LoRA")
"""Names of the table of patches, and of what the head may take."""


def models():
    """Three documents end to end through a LoRA of two blocks, beside the library's own forward on padded rows."""
    from unittest import mock

    import numpy as np
    import transformers
    from liger_kernel.ops import swiglu as module

    from llmtune.adapters.attach import attach_adapter
    from llmtune.config.schema import AdapterConfig
    from llmtune.data.dataset.micro_batch import make_micro_batch
    from llmtune.data.example import Example
    from llmtune.engine.objective import flat_nll_sum, plain_nll_sum
    from llmtune.kernels import patch_model as table
    from llmtune.kernels.attention import use_attention, use_segment_attention
    from llmtune.kernels.linear_cross_entropy import find_head
    from llmtune.models.parameters import base_model_of

    module.float = Scalar
    # Torch's own formula in the place of its kernel, which only a GPU has.
    norm = torch.ops.aten._fused_rms_norm_backward.default
    twins = torch.library.Library("aten", "IMPL")
    twins.impl(norm, torch._decomp.decomposition_table[norm], "CPU")
    torch.nn.attention.flex_attention._validate_device = lambda *_rows: None  # uncompiled it has a backward pass here
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=531, num_hidden_layers=2, pad_token_id=0, **shape)
    model, _ = attach_adapter(
        transformers.AutoModelForCausalLM.from_config(config), AdapterConfig(method="lora", r=4, alpha=8.0), seed=0
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    base, random = base_model_of(model), np.random.default_rng(0)
    documents = []
    for size in (23, 40, 9):
        ids, weights = random.integers(3, 531, size).astype(np.int32), np.ones(size, np.float32)
        weights[0] = 0
        documents.append(Example(f"{size} tokens", ids, weights))

    def measured(loss):
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach(), torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    expected = measured(lambda: plain_nll_sum(model, make_micro_batch(documents, "padded", 0)))
    flat, everything = make_micro_batch(documents, "flat", 0), table.PATCHES
    cases = {name: ((name,), "sdpa") for name in KERNELS}
    cases |= {f"attention by {name}": ((), name) for name in ("sdpa", "tiles", "flex")}
    cases["everything"] = KERNELS, "flex"
    for label, (kernels, attention) in cases.items():
        with mock.patch.object(table, "PATCHES", [row for row in everything if row.name in kernels]):
            counts = table.patch_model(base, "cuda", ("torch", LIGER))
            assert all(counts[row.name] for row in table.PATCHES if row.only_on != "cpu")
            head = find_head(base, (LIGER,) if "cross-entropy by Liger" in kernels else ())
            before = use_segment_attention(base, attention)
            found = measured(partial(flat_nll_sum, model, flat, head=head, device=torch.device("cpu")))
            use_attention(base, before)
            table.undo_patches(base)
        yield label, [apart(one, other) for one, other in zip(found, expected, strict=True)]


def interpret():
    torch.manual_seed(0)
    cases = {"swiglu": swiglu, "rotary": rotary, "cross-entropy": cross_entropy, "loss": head}
    return {name: case() for name, case in cases.items()}


SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""What a block may take of a multiprocessor's shared memory (CUDA's programming guide, table of capabilities)."""


def sources(capability):
    """Liger's kernels as an 8B Llama calls them: (name, kernel, constants, types of the other arguments, warps)."""
    from liger_kernel.ops import cross_entropy, rope, swiglu

    number = "fp16" if capability < 80 else "bf16"
    feed_forward = {"n_cols": 14336, "BLOCK_SIZE": 16384}
    tiled = {"BLOCK_SIZE": 1024}
    scalars = {"stride": "i32", "gate_multiplier": "fp32", "n_cols": "i32"}
    heads = {"n_qh": 32, "n_kh": 8, "hd": 128, "rd": 128, "bs": 1, "cos_bs": 1, "BLOCK_SIZE": 32}
    padded = {"pad_n_qh": 32, "pad_n_kh": 8, "pad_hd": 128, "pad_rd": 128}
    strides = dict.fromkeys(("q_row_stride", "k_row_stride", "cos_row_stride", "sin_row_stride", "sl"), "i32")
    loss = {
        **dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")),
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "sum",
        "BLOCK_SIZE": 32768,
        **dict.fromkeys(("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS"), False),
        "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False,
        "HAS_GRADIENTS": True,
    }
    of_loss = {"Y_ptr": "*i64", "loss_ptr": "*fp32", "weight_sum": "fp32"}
    for name in ("forward", "backward"):
        yield f"swiglu {name}", getattr(swiglu, f"_swiglu_{name}_kernel"), feed_forward, scalars, 16, number
        yield f"swiglu {name}, tiled", getattr(swiglu, f"_swiglu_{name}_kernel_tiled"), tiled, scalars, 4, number
        constants = {**heads, **padded, "BACKWARD_PASS": name == "backward"}
        yield f"rotary {name}", rope._triton_rope, constants, strides, 4, number
    yield "cross-entropy", cross_entropy.liger_cross_entropy_kernel, loss, of_loss, 32, number


def compiled():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for capability, allowed in SHARED_BYTES.items():
        for name, kernel, constants, types, warps, number in sources(capability):
            signature = {}
            for argument in kernel.arg_names:
                pointer = argument.endswith("_ptr") or argument in ("cos", "sin")
                rest = types.get(argument, f"*{number}" if pointer else "i32")
                signature[argument] = "constexpr" if argument in constants else rest
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            assert made.asm["cubin"]
            found[f"{name} on {capability}"] = [made.metadata.shared, allowed]
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "model": lambda: dict(models()), "compile": compiled}[sys.argv[1]]()))
