"""The streaming reader of JSON arrays: the same values in any blocks, in bounded memory."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.data.preprocess.readers.json_array import read_json_array
from glm3cli.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    values=st.lists(json_values, max_size=5),
    block=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_an_array_is_read_the_same_in_any_blocks(values, block, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    data = io.BytesIO(text.encode("utf-8", "surrogatepass"))
    assert list(read_json_array(data, "file", block)) == values


@settings(max_examples=100)
@given(values=st.lists(json_values, min_size=1, max_size=4), share=st.floats(0, 0.99))
def test_an_array_cut_anywhere_is_an_error(values, share):
    data = json.dumps(values).encode()
    with pytest.raises(DataError):
        list(read_json_array(io.BytesIO(data[: int(len(data) * share)]), "file", 4))


def test_a_long_array_is_read_in_bounded_memory():
    class Endless(io.RawIOBase):
        """An array of many megabytes that exists only while it is read."""

        size = 0

        def read(self, size: int = -1) -> bytes:
            start = b"[" if self.size == 0 else b""
            if self.size >= 1 << 22:
                size, self.size = self.size, 1 << 40
                return b"{}]" if size < 1 << 40 else b""
            self.size += size
            return start + b'{"a": "' + b"x" * 90 + b'"},'

    file = Endless()
    num_ahead = 0
    for number, _ in enumerate(read_json_array(file, "file", 100), 1):
        if file.size < 1 << 40:
            num_ahead = max(num_ahead, file.size // 100 - number)
    assert number > 40_000
    assert num_ahead < 5
