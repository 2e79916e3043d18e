"""The header of a safetensors file as it is written: eight bytes of length, JSON, blanks up to a multiple of eight."""

import json

import numpy as np
from safetensors.numpy import load

from jaxlm.convert.files.safetensors_file import header
from jaxlm.convert.files.stream import Planned


def test_the_library_finds_each_tensor_where_the_header_puts_it() -> None:
    arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.ones((2, 2), np.float32), "c": np.array([7.0])}
    plans = [Planned(name, x.shape, str(x.dtype), lambda x=x: x) for name, x in arrays.items()]
    text, starts = header(plans)
    assert len(text) % 8 == 0 and int.from_bytes(text[:8], "little") == len(text) - 8
    assert json.loads(text[8:])["b"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [3, 19]}
    assert starts == [len(text), len(text) + 3, len(text) + 19]
    found = load(text + b"".join(x.tobytes() for x in arrays.values()))
    assert all(np.array_equal(found[name], x) and found[name].dtype == x.dtype for name, x in arrays.items())


def test_an_empty_file_has_a_header() -> None:
    text, starts = header([])
    assert load(text) == {} and starts == []
