import jax
import jax.numpy as jnp
import pytest

from jmx8 import explain, mx_matmul, mx_matmul_w8a8, mx_moe, quantize, route
from jmx8.ops import _dispatch, matmul


def make_fake(name, problem):
    return _dispatch.Backend(
        name,
        lambda x, w, **_: problem,
        lambda x, w, *, out_dtype: jnp.full((x.shape[0], w.shape[0]), 7, out_dtype),
        "is the fastest here",
    )


@pytest.fixture
def operands():
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    return x, quantize(x[:3])


@pytest.fixture
def with_backend(monkeypatch):
    def install(name, problem):
        op = matmul._MATMUL
        backends = (make_fake(name, problem), op.backends[-1])
        changed = _dispatch.Op(op.name, backends, op.fold, op.reference)
        monkeypatch.setattr(matmul, "_MATMUL", changed)

    return install


def test_first_supported_backend_runs(operands, with_backend):
    with_backend("fake", None)
    assert jnp.all(mx_matmul(*operands) == 7)
    text = str(explain(mx_matmul, *operands))
    assert "-> fake: is the fastest here" in text


def test_unsupported_backend_is_passed_over_with_its_reason(operands, with_backend):
    with_backend("fake", "n must be a multiple of 128, got 3")
    assert jnp.any(mx_matmul(*operands) != 7)
    lines = str(explain(mx_matmul, *operands)).splitlines()
    assert lines[0].startswith("device: ")
    assert lines[1:] == [
        "1 x mx_matmul(bfloat16[4,64], MXArray(bfloat16[3,64])) -> xla: runs "
        "everywhere",
        "  not fake: n must be a multiple of 128, got 3",
    ]


def test_named_backend_is_never_replaced(operands, with_backend):
    with_backend("fake", "n must be a multiple of 128, got 3")
    message = r"'fake' cannot run: n must be .* Pass implementation=None"
    x, w = operands
    with pytest.raises(NotImplementedError, match=message):
        matmul._matmul(matmul._MATMUL, x, w, None, "fake")
    choices = explain(mx_matmul, *operands, implementation="xla").choices
    assert [c.reason for c in choices] == ["asked for by name"]


def test_unknown_backend_lists_the_known(operands):
    names = r"\['sm90', 'flashinfer_cutile', 'xla'\]"
    message = rf"unknown implementation 'cuda'; expected one of {names}, or None"
    x, w = operands
    with pytest.raises(ValueError, match=message):
        matmul._matmul(matmul._MATMUL, x, w, None, "cuda")


def test_choice_sees_the_folded_batch(operands):
    x, w = operands
    explanation = explain(jax.vmap(jax.vmap(lambda x: mx_matmul(x, w))), x[None])
    (choice,) = explanation.choices
    assert choice.op == "mx_matmul(bfloat16[4,64], MXArray(bfloat16[3,64]))"
    assert explanation.choices[choice] == 1


def test_explains_whole_functions_on_abstract_values(operands):
    x, w = operands
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), quantize(jnp.ones((64, 64))))

    def model(x):
        ids, weights = route(mx_matmul(x, w), "softmax", 1)
        out = mx_moe(x, stack, stack, ids, weights, activation="relu2")
        return mx_matmul_w8a8(out, w) + mx_matmul_w8a8(x, w)

    explanation = explain(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    counts = {c.op.partition("(")[0]: n for c, n in explanation.choices.items()}
    assert counts == {"mx_matmul": 1, "route": 1, "mx_moe": 1, "mx_matmul_w8a8": 2}
    assert "no jmx8 op is called" in str(explain(jnp.sin, x))
