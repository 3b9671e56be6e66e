"""What the tests of Flax models share."""

import jax
import jax.numpy as jnp

import jmx8


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def is_mx(x):
    return isinstance(x, jmx8.MXArray)


def count_calls(function, *args):
    """Returns how many products with MXFP8 weights a function makes.

    Checks that nothing but the op reads the elements or scales of a weight: no float
    copy of one can then exist outside of it.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr):
    count = 0
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        # How the ops wrap their backends, for gradients and for `jax.vmap`.
        if eqn.primitive.name == "custom_vjp_call" and any(
            sub.eqns[0].primitive.name == "custom_vmap_call" for sub in inner
        ):
            count += 1
        elif inner:
            count += sum(map(_count, inner))
        else:
            types = [str(var.aval) for var in (*eqn.invars, *eqn.outvars)]
            assert not any("f8_" in text or "float8" in text for text in types), eqn
    return count


def _inner(eqn):
    values = [
        value
        for param in eqn.params.values()
        for value in (param if isinstance(param, (tuple, list)) else [param])
    ]
    jaxprs = [getattr(value, "jaxpr", value) for value in values]
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


def lowered(function, *args):
    """Returns the program that a function compiles to."""

    def program(*args):
        return function(*args)

    return jax.jit(program).lower(*args).as_text()
