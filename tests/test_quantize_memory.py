import json

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmx8.convert import (
    count_nonfinite,
    params as params_module,
    quantize_params,
)

from .convert_helpers import (
    assert_same_bytes,
    is_mx,
    normal,
    quantized,
    small_tree,
)


def test_sources_are_freed_and_what_is_kept_is_not():
    tree = small_tree()
    out = quantize_params(tree)
    assert tree["layers"][0]["q_proj"]["weight"].is_deleted()
    assert tree["layers"][1]["experts"]["w13"].is_deleted()
    assert not tree["lm_head"]["weight"].is_deleted()
    assert not tree["layers"][0]["q_proj"]["bias"].is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(out) if eqx.is_array(x))


def test_nothing_is_freed_without_donation():
    tree = small_tree()
    quantize_params(tree, donate=False, return_report=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(tree) if eqx.is_array(x))


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


def test_peak_memory_is_the_result_and_one_leaf(monkeypatch):
    tree = [{"weight": normal(i, (64 + 32 * i, 1024))} for i in range(4)]
    sizes = [leaf["weight"].nbytes for leaf in tree]
    before, seen = live_bytes(), []
    convert = params_module.convert_leaf

    def record(*args, **kwargs):
        result = convert(*args, **kwargs)
        jax.block_until_ready(result[0])
        seen.append(live_bytes())
        return result

    monkeypatch.setattr(params_module, "convert_leaf", record)
    out = quantize_params(tree)
    results = [leaf["weight"].nbytes for leaf in out]
    assert live_bytes() == before - sum(sizes) + sum(results)
    # When a leaf has been converted, all earlier sources are gone.
    for i, live in enumerate(seen):
        assert live == before - sum(sizes[:i]) + sum(results[: i + 1])


def test_array_in_two_places_stays_shared():
    shared = normal(0, (32, 64))
    size = shared.nbytes
    tree = {"a": {"weight": shared}, "b": {"weight": shared}, "c": {"kernel": shared}}
    tree["norm"] = {"weight": normal(1, (64,))}
    expected = quantized(shared), quantized(shared, axis=-2)
    tree["norm2"] = tree["norm"]
    out, report = quantize_params(tree, return_report=True)
    assert out["a"]["weight"] is out["b"]["weight"]
    assert out["norm"]["weight"] is out["norm2"]["weight"]
    assert_same_bytes(out["a"]["weight"], expected[0])
    assert_same_bytes(out["c"]["kernel"], expected[1])
    assert shared.is_deleted()
    rows = {row.path: row for row in report.rows}
    assert rows["b/weight"].reason == "shared with a/weight"
    assert rows["norm2/weight"].reason == "shared with norm/weight"
    assert report.bytes_before == size + 128
    assert report.bytes_after == sum(w.nbytes for w in expected) + 128


@pytest.mark.parametrize("alias", [False, True])
def test_array_that_is_also_kept_is_not_freed(alias):
    embedding = normal(0, (32, 64))
    other = jax.device_put(embedding, jax.devices()[0]) if alias else embedding
    tree = {"embed": {"weight": embedding}, "out": {"weight": other}}
    out = quantize_params(tree)
    assert is_mx(out["out"]["weight"]) and out["embed"]["weight"] is embedding
    assert not embedding.is_deleted()
    np.asarray(embedding)


def test_buffer_under_two_array_objects_is_converted_once():
    x = normal(0, (32, 64))
    y = jax.device_put(x, jax.devices()[0])
    assert x is not y
    out = quantize_params([{"weight": x}, {"weight": y}])
    assert out[0]["weight"] is out[1]["weight"]


def test_deleted_input_is_named():
    tree = small_tree()
    quantize_params(tree)
    text = "layers/0/q_proj/weight: has been deleted, perhaps by donation"
    with pytest.raises(ValueError, match=text):
        quantize_params(tree)


@pytest.mark.parametrize("asarray", [jnp.asarray, np.asarray])
def test_non_finite_weights_are_one_error_and_nothing_is_lost(asarray):
    bad = normal(0, (32, 64)).at[3, 5].set(jnp.nan).at[4, 5:7].set(-jnp.inf)
    worse = normal(1, (32, 64)).at[0].set(jnp.nan)
    tree = {
        "good": {"weight": normal(2, (32, 64))},
        "bad": {"weight": asarray(bad)},
        "worse": [{"weight": asarray(worse)}],
        "norm": {"weight": jnp.full((8, 8), jnp.nan)},
    }
    with pytest.raises(ValueError) as error:
        quantize_params(tree)
    assert str(error.value) == (
        "quantize_params: weights must be finite, but 2 of them are not:\n"
        "  bad/weight: 1 NaN, 2 infinite\n"
        "  worse/0/weight: 64 NaN, 0 infinite\n"
        'Nothing was converted. Pass on_nonfinite="keep" to quantize them.'
    )
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    assert not any(x.is_deleted() for x in arrays)
    out, report = quantize_params(
        tree, on_nonfinite="keep", donate=False, return_report=True
    )
    assert_same_bytes(out["bad"]["weight"], quantized(bad))
    assert_same_bytes(out["worse"][0]["weight"], quantized(worse))
    assert report.worst(1)[0].path == "bad/weight"
    json.dumps(report.to_dict(), allow_nan=False)


def test_count_nonfinite():
    x = jnp.asarray([[1.0, jnp.nan, jnp.inf], [-jnp.inf, 0.0, jnp.inf]])
    assert count_nonfinite(x) == (1, 3)
    assert count_nonfinite(np.ones((2, 2), ml_dtypes.bfloat16)) == (0, 0)


def test_unknown_on_nonfinite_is_refused():
    with pytest.raises(ValueError, match='must be "raise" or "keep", got \'ignore\''):
        params_module.convert_tree(
            "quantize_params",
            {},
            params_module.make_rules(None, None),
            on_nonfinite="ignore",
            donate=True,
            with_stats=False,
        )
