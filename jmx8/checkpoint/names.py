"""Which tensors of a checkpoint make up which parameter of a model.

One table per family, written as strings only: a model is known by the paths of its
parameters (`layers/3/mlp/experts/w13`), whatever framework it is written in.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Slot:
    """The rows of a parameter that one tensor fills.

    Attributes:
        name: Name of the tensor in the checkpoint.
        shape: Shape that it must have.
        start: First row that it fills, in the parameter with all axes but the last
            merged. It fills as many as it has rows.
    """

    name: str
    shape: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the parameters of one kind are stored.

    Attributes:
        path: Path of the parameter, with fields such as `{layer}`.
        names: Names of the tensors whose rows follow each other in the parameter, with
            the same fields. With `{expert}`, once for every index of its first axis.
        fused: Name of one tensor that may hold the whole parameter instead, or "".
    """

    path: str
    names: tuple[str, ...]
    fused: str = ""

    def alternatives(self, path: str, shape: Sequence[int]) -> list[list[Slot]] | None:
        """Returns the ways to store the parameter of a path, None if not by this rule.

        Args:
            path: Path of a parameter.
            shape: Its shape.

        Returns:
            Lists of slots, each of which fills the parameter without overlap.
        """
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(self.path))
        match = re.fullmatch(pattern, path)
        if match is None:
            return None
        fields, shape = match.groupdict(), tuple(shape)
        result = [list(self._slots(fields, shape))]
        if self.fused:
            result.append([Slot(self.fused.format(**fields), shape, 0)])
        return result

    def _slots(self, fields: dict[str, str], shape: tuple[int, ...]) -> Iterator[Slot]:
        stacked = any("{expert}" in name for name in self.names)
        part = list(shape[1:] if stacked else shape)
        part[0] //= len(self.names)
        rows = math.prod(part[:-1])
        start = 0
        for expert in range(shape[0] if stacked else 1):
            for name in self.names:
                full_name = name.format(**fields, expert=expert)
                yield Slot(full_name, tuple(part), start)
                start += rows


@dataclasses.dataclass(frozen=True)
class NameTable:
    """The rules of a model family.

    Attributes:
        rules: One per kind of parameter.
        tied: Pairs of names: a tensor that a model with tied embeddings has no
            parameter for, and the one whose copy it must be if a file has it.
    """

    rules: tuple[Rule, ...]
    tied: tuple[tuple[str, str], ...] = ()

    def alternatives(self, path: str, shape: Sequence[int]) -> list[list[Slot]]:
        """Returns the ways in which a checkpoint may store a parameter.

        Args:
            path: Path of the parameter.
            shape: Its shape.

        Returns:
            At least one list of slots, the usual way first. Each fills the parameter
            without overlap.

        Raises:
            ValueError: If the table does not know the parameter.
        """
        for rule in self.rules:
            result = rule.alternatives(path, shape)
            if result is not None:
                return result
        raise ValueError(f"NameTable: no rule for a parameter {path!r}.")

    def names(self, path: str, shape: Sequence[int]) -> list[str]:
        """Returns every name that a tensor of the parameter may have."""
        ways = self.alternatives(path, shape)
        return [slot.name for slots in ways for slot in slots]


_QWEN3_LAYER = "model.layers.{layer}"
_QWEN3_EXPERTS = f"{_QWEN3_LAYER}.mlp.experts"

# Parameters of a layer that have one tensor, of the same name but for the separators.
_QWEN3_SAME = """
    input_layernorm.weight post_attention_layernorm.weight
    self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
    self_attn.o_proj.weight self_attn.q_norm.weight self_attn.k_norm.weight
    self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias
    self_attn.o_proj.bias
    mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight
    mlp.gate.weight
""".split()

QWEN3 = NameTable(
    rules=(
        Rule("embed_tokens/weight", ("model.embed_tokens.weight",)),
        Rule("norm/weight", ("model.norm.weight",)),
        Rule("lm_head/weight", ("lm_head.weight",)),
        *(
            Rule(
                f"layers/{{layer}}/{name.replace('.', '/')}",
                (f"{_QWEN3_LAYER}.{name}",),
            )
            for name in _QWEN3_SAME
        ),
        Rule(
            "layers/{layer}/mlp/experts/w13",
            (
                f"{_QWEN3_EXPERTS}.{{expert}}.gate_proj.weight",
                f"{_QWEN3_EXPERTS}.{{expert}}.up_proj.weight",
            ),
            fused=f"{_QWEN3_EXPERTS}.gate_up_proj",
        ),
        Rule(
            "layers/{layer}/mlp/experts/w2",
            (f"{_QWEN3_EXPERTS}.{{expert}}.down_proj.weight",),
            fused=f"{_QWEN3_EXPERTS}.down_proj",
        ),
    ),
    tied=(("lm_head.weight", "model.embed_tokens.weight"),),
)


def find_table(shapes: Mapping[str, Sequence[int]]) -> NameTable | None:
    """Returns the table that has a rule for each of a model's parameters, if one has.

    Args:
        shapes: Shape of every parameter by path.
    """
    for table in (QWEN3,):
        known = (r.alternatives(p, s) for p, s in shapes.items() for r in table.rules)
        if shapes and sum(ways is not None for ways in known) == len(shapes):
            return table
    return None
