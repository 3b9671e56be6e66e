"""Hostile files are read or refused, and nothing else happens.

A short version of benchmarks/fuzz_checkpoint.py: mutations that are the same in every
run, and the inputs that reached the most code in a long one.
"""

import base64
import functools
import json
import pathlib
from random import Random

import hypothesis
import hypothesis.strategies as st
import pytest

import jmx8.checkpoint.folder

from .fuzz_target import make_target, mutate


pytestmark = pytest.mark.cpu

CORPUS = pathlib.Path(__file__).parent / "data" / "fuzz_corpus.json"
target = functools.cache(make_target)

short = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=400,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@short
@hypothesis.given(kind=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_structures_that_lie_are_refused(kind, seed):
    data = mutate(target().seeds()[kind], Random(seed))
    assert target().execute(data)


@short
@hypothesis.given(
    kind=st.integers(0, 5),
    place=st.floats(0, 1, exclude_max=True),
    length=st.integers(0, 40),
    replacement=st.binary(max_size=40),
)
def test_bytes_that_are_wrong_are_refused(kind, place, length, replacement):
    seed = target().seeds()[kind]
    start = 1 + int(place * (len(seed) - 1))
    assert target().execute(seed[:start] + replacement + seed[start + length :])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=8,
)


@short
@hypothesis.given(kind=st.integers(1, 4), document=JSON)
def test_any_json_is_refused_or_read(kind, document):
    text = json.dumps(document).encode()
    assert target().execute(bytes([kind]) + text)


def test_inputs_that_reached_new_code_are_refused_or_read():
    inputs = [base64.b64decode(text) for text in json.loads(CORPUS.read_text())]
    outcomes = [target().execute(data) for data in inputs]
    assert "read" in outcomes and len(set(outcomes)) > 20


def test_the_target_notices_a_file_that_is_opened_outside(monkeypatch):
    """What a run without a crash is worth: the target would have seen one."""
    weight_map = {"x": "../outside.safetensors"}
    data = b"\3" + json.dumps({"weight_map": weight_map}).encode()
    assert "not the plain name" in target().execute(data)
    monkeypatch.setattr(jmx8.checkpoint.folder, "_is_plain_name", lambda name: True)
    with pytest.raises(AssertionError, match="was opened, outside of"):
        target().execute(data)
