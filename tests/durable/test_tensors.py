"""Tensors written and read without the library are what the library writes and reads."""

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch

from llmtune import durable
from llmtune.errors import CheckpointError

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,  # noqa: E501
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,  # noqa: E501
]  # fmt: skip


def every_kind():
    tensors = {f"{dtype}".removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES}
    return {
        **tensors,
        "scalar": torch.tensor(0.1),
        "empty": torch.empty(0, 3),
        "é\n": torch.ones(1),
        "b": torch.zeros(4),
    }


def same_bits(one, two):
    return (
        one.dtype == two.dtype
        and one.shape == two.shape
        and one.reshape(-1).view(torch.uint8).equal(two.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_file_is_byte_for_byte_the_librarys(tmp_path, metadata):
    durable.write_tensors(tmp_path / "ours", every_kind(), metadata)
    safetensors.torch.save_file(every_kind(), tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_read_is_bit_for_bit_what_was_written(tmp_path):
    durable.write_tensors(tmp_path / "x", every_kind(), {"note": "é"})
    tensors, metadata = durable.read_tensors(tmp_path / "x")
    assert metadata == {"note": "é"}
    assert tensors.keys() == every_kind().keys()
    assert all(same_bits(tensors[name], tensor) for name, tensor in every_kind().items())


def test_views_transposes_parameters_and_numpy_arrays_are_written_as_they_look(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "view": base[1:3],
        "t": base.t(),
        "again": base[1:3],
        "p": torch.nn.Parameter(base),
        "n": np.arange(6.0).reshape(2, 3).T,
    }
    durable.write_tensors(tmp_path / "x", tensors)
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert all(
        same_bits(loaded[name], torch.as_tensor(tensor).detach().contiguous()) for name, tensor in tensors.items()
    )


def test_nan_payloads_survive(tmp_path):
    """P2: bit for bit, also what is not a number."""
    odd = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    durable.write_tensors(tmp_path / "x", {"odd": odd})
    assert same_bits(durable.read_tensors(tmp_path / "x")[0]["odd"], odd)


def test_a_type_the_format_does_not_have_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="tensor `x` has type complex128"):
        durable.write_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_a_digest_that_does_not_fit_gives_no_tensors(tmp_path):
    """P5."""
    durable.write_tensors(tmp_path / "x", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="sha256 does not fit"):
        durable.read_tensors(tmp_path / "x", sha256="0" * 64)


def test_a_file_cut_at_any_place_is_refused(tmp_path):
    durable.write_tensors(tmp_path / "x", {"x": torch.arange(4), "y": torch.zeros(3)})
    whole = (tmp_path / "x").read_bytes()
    for size in range(len(whole)):
        os.truncate(tmp_path / "x", 0)
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            durable.read_tensors(tmp_path / "x")


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b"\xff", b"[" * 50_000,
        {"x": entry(dtype="F33")}, {"x": entry(shape=[3])}, {"x": entry(shape=[-2])}, {"x": entry(shape="2")},
        {"x": entry(shape=[2**62, 2**62])}, {"x": entry(shape=[0, 2**63], data_offsets=[0, 0])}, {"x": entry(shape=[True, 2])},  # noqa: E501
        {"x": entry(shape=[1] * 65 + [2])}, {"x": entry(more=1)},
        {"x": entry(data_offsets=[0, 4])}, {"x": entry(data_offsets=[4, 12])}, {"x": entry(data_offsets=[8, 0])},
        {"x": entry(data_offsets=["a", 8])},
        {"x": entry(data_offsets=[0])}, {"x": entry(data_offsets=None)}, {"x": {}}, {"x": 1}, {"x": entry(), "y": entry()}, {},  # noqa: E501
        {"x": entry(), "__metadata__": {"a": 1}}, {"x": entry(), "__metadata__": []},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, header):
    """Nobody let in: no header makes the reader crash, allocate without bound, or return half-filled tensors."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        durable.read_tensors(tmp_path / "x")


def test_a_header_length_beyond_the_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims 9223372036854775808 bytes"):
        durable.read_tensors(tmp_path / "x")
