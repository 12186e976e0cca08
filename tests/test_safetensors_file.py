"""Headers of safetensors files: what the safetensors library rejects is rejected, whatever is in them."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from lidit_jax.errors import UserError
from lidit_jax.weights.safetensors_file import SafetensorsFile


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def encode(header, num_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def library_accepts(content):
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def is_accepted(file, content):
    file.write_bytes(content)
    try:
        SafetensorsFile(epath.Path(file)).close()
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
INVALID = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 12), "c": entry(12, 16)},
    "overlap and hole of equal size": {"a": entry(0, 8), "b": entry(4, 8), "c": entry(12, 16)},
    "the same bytes twice": {"a": entry(0, 8), "b": entry(0, 8)},
    "hole": {"a": entry(0, 4), "b": entry(8, 16)},
    "bytes after the last": {"a": entry(0, 8)},
    "empty tensor within another": {"a": entry(0, 16), "b": entry(4, 4)},
    "key twice": TWICE,
    "field twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "metadata that is no text": {"__metadata__": {"format": 1}, "a": entry(0, 16)},
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "unknown type": {"a": entry(0, 16, dtype="F33")},
    "integers of another size": {"a": entry(0, 16, [3], "I64")},
    "name that is not Unicode": b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_header_is_rejected(tmp_path, kind):
    content = encode(INVALID[kind], 16)
    assert kind == "key twice" or not library_accepts(content)
    assert not is_accepted(tmp_path / "model.safetensors", content)


@pytest.mark.parametrize("size", [16, 17])
def test_a_header_in_a_bucket_is_checked_without_its_data(tmp_path, size):
    header = encode({"a": entry(0, 8), "b": entry(8, 16)}, 0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(header + bytes(16))
    opened = SafetensorsFile(epath.Path(file))
    opened.file = "gs://bucket/model.safetensors"
    if size == 16:
        opened._check_with_library(header, len(header) + size)
    else:
        with pytest.raises(safetensors.SafetensorError):
            opened._check_with_library(header, len(header) + size)
    opened.close()


OFFSETS = st.sampled_from([-1, 0, 4, 8, 12, 16, 20, 2**63, 1.0, None])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "f32", 1]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 2**62, -1, 2.0]), max_size=3),
        "data_offsets": st.lists(OFFSETS, min_size=1, max_size=3),
    },
    optional={"more": st.none()},
)
PLAIN = st.integers(0, 4).flatmap(lambda first: st.integers(first, 4).map(lambda last: entry(4 * first, 4 * last)))


@given(
    entries=st.lists(st.tuples(st.sampled_from("abc"), PLAIN | ENTRIES), max_size=4),
    num_bytes=st.sampled_from([0, 8, 16]),
)
def test_what_the_library_rejects_is_rejected(tmp_path_factory, entries, num_bytes):
    text = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in entries)
    content = encode(f"{{{text}}}".encode(), num_bytes)
    if not library_accepts(content):
        assert not is_accepted(tmp_path_factory.getbasetemp() / "entries.safetensors", content)


@given(position=st.integers(0, 200), value=st.binary(min_size=1, max_size=3), insert=st.booleans())
def test_a_mutated_header_is_rejected_where_the_library_rejects_it(tmp_path_factory, position, value, insert):
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16), "empty": np.zeros((0, 4), np.float32)}
    content = bytearray(safetensors.numpy.save(tensors, {"format": "pt"}))
    position = min(position, len(content))
    content[position : position + (0 if insert else len(value))] = value
    if not library_accepts(bytes(content)):
        assert not is_accepted(tmp_path_factory.getbasetemp() / "mutated.safetensors", content)
