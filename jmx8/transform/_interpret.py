"""An interpreter of jaxprs in which some values are MXFP8 arrays.

Why not `quax`, the ecosystem's way to give array-like types rules for primitives: as of
0.4.6 (with JAX 0.10.2 and 0.11.2) it raises on every `custom_vjp` function that is
called on a value computed from an array-like one, and has no rule for `jax.checkpoint`;
it wants the array type to derive from its own; it traces through `jax._src`, and brings
`plum-dispatch`. All that is needed here fits in this file, on public interfaces.

A jaxpr is evaluated equation by equation, as `jax.core.eval_jaxpr` does. Equations
without an MXFP8 operand are bound as they are, with their custom derivatives. Control
flow that gets one is rebuilt around its interpreted body; functions with custom
derivatives, and jitted ones, are inlined.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal as JaxprLiteral

from ._rules import RULES
from ._view import MXView, NoRule, stack, unstack, widen


Fallback = Literal["raise", "dequantize"]
Product = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """How MXFP8 arrays are treated.

    Attributes:
        matmul: `x [*g, m, k]`, `w [*g, n, k]`, out_dtype to `[*g, m, n]`.
        ragged_dot: `x [m, k]`, `w [g, n, k]`, group_sizes, out_dtype to `[m, n]`.
        fallback: What happens to an operation that has no rule.
    """

    matmul: Product
    ragged_dot: Product
    fallback: Fallback

    def __call__(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr, closed or without constants."""
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
        )
        read = lambda atom: atom.val if isinstance(atom, JaxprLiteral) else env[atom]
        last = _last_uses(jaxpr)
        for i, eqn in enumerate(jaxpr.eqns):
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with (
                source_info_util.user_context(
                    eqn.source_info.traceback, name_stack=names
                ),
                eqn.ctx.manager,
            ):
                outs = self._apply(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
            for var in last.get(i, ()):
                del env[var]
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, values: list[Any]) -> list[Any]:
        if not any(_is_mx(value) for value in values):
            return _bind(eqn, values)
        name = eqn.primitive.name
        try:
            if name in CONTROL_FLOW:
                return CONTROL_FLOW[name](self, eqn, values)
            if name not in RULES:
                raise NoRule("there is no rule for it")
            outs = RULES[name](self, eqn, values)
            return list(outs) if eqn.primitive.multiple_results else [outs]
        except NoRule as reason:
            self._fall_back(eqn, values, reason)
        return _bind(eqn, [widen(v) if _is_mx(v) else v for v in values])

    def _fall_back(self, eqn: Any, values: list[Any], reason: NoRule) -> None:
        weights = [v for v in values if _is_mx(v) and not v.is_rows]
        if not weights:
            return
        shapes = ", ".join(_describe(value) for value in values)
        where = source_info_util.summarize(eqn.source_info)
        where = f" at {where}" if where else ""  # Code of JAX itself has no place.
        what = f"quantized: `{eqn.primitive.name}` of ({shapes}){where}: {reason}."
        if self.fallback == "dequantize":
            warnings.warn(
                f"{what} Dequantized {', '.join(map(repr, weights))}.", stacklevel=2
            )
            return
        raise NotImplementedError(
            f"{what} Keep that weight unquantized (`skip`), change the function, or "
            'pass fallback="dequantize" to widen the weight there.'
        ) from None


def _is_mx(value: Any) -> bool:
    return isinstance(value, MXView)


def _describe(value: Any) -> str:
    return repr(value) if _is_mx(value) else jax.typeof(value).str_short()


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Returns the variables that are dead after each equation."""
    kept = {atom for atom in jaxpr.outvars if not isinstance(atom, JaxprLiteral)}
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, JaxprLiteral) and atom not in kept:
                last[atom] = i
    dead: dict[int, list[Any]] = {}
    for var, i in last.items():
        dead.setdefault(i, []).append(var)
    return dead


def _jit(interpret, eqn, values):
    constrain = lambda value, sharding: (
        lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not _is_mx(value)
        else value
    )
    values = map(constrain, values, eqn.params["in_shardings"])
    outs = interpret(eqn.params["jaxpr"], [*values])
    return [*map(constrain, outs, eqn.params["out_shardings"])]


def _call(interpret, eqn, values):
    return interpret(eqn.params["call_jaxpr"], values)


def _remat(interpret, eqn, values):
    function = jax.checkpoint(
        lambda *args: interpret(eqn.params["jaxpr"], args),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return function(*values)


def _scan(interpret, eqn, values):
    params = eqn.params
    if "ft_in" in params:  # since JAX 0.11
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, rest = values[:num_consts], values[num_consts:]
    carry, xs = rest[:num_carry], rest[num_carry:]

    def body(carry, xs):
        outs = interpret(params["jaxpr"], [*consts, *carry, *xs])
        return outs[:num_carry], outs[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    xs = [unstack(x) if _is_mx(x) else x for x in xs]
    carry, ys = lax.scan(body, carry, xs, **options)
    return [*carry, *(stack(y) if _is_mx(y) else y for y in ys)]


def _while(interpret, eqn, values):
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, values = values[:num_cond], values[num_cond:]
    body_consts, carry = values[:num_body], values[num_body:]
    return lax.while_loop(
        lambda carry: interpret(params["cond_jaxpr"], [*cond_consts, *carry])[0],
        lambda carry: interpret(params["body_jaxpr"], [*body_consts, *carry]),
        carry,
    )


def _cond(interpret, eqn, values):
    index, *operands = values
    flat, structure = jax.tree.flatten(operands)
    structures = []

    def trace(branch):
        def function(*flat):
            outs = interpret(branch, jax.tree.unflatten(structure, flat))
            flat_outs, out_structure = jax.tree.flatten(outs)
            structures.append(out_structure)
            return flat_outs

        return jax.make_jaxpr(function)(*flat)

    branches = tuple(trace(branch) for branch in eqn.params["branches"])
    if any(other != structures[0] for other in structures):
        raise NoRule("its branches return MXFP8 arrays in some cases and not in others")
    outs = eqn.primitive.bind(index, *flat, **{**eqn.params, "branches": branches})
    return jax.tree.unflatten(structures[0], outs)


CONTROL_FLOW: dict[str, Callable[[Interpreter, Any, list[Any]], list[Any]]] = {
    "jit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
