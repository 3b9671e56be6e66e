"""Reads the fields of a JSON object with types, ranges, and one-line errors."""

import math
import reprlib
import sys
from collections.abc import Collection, Mapping
from typing import Any, NoReturn


_REQUIRED: Any = object()
_MAX_NAME = 80
_MAX_INT = 2**31 - 1  # array indices are int32


class ConfigError(ValueError):
    """A model configuration that cannot be honoured. One line, naming the field."""


class Fields:
    """The fields of a JSON object; remembers which of them have been read.

    A default makes a field optional. Every method that reads a field raises
    `ConfigError` if the value is missing, of the wrong type, or out of range.

    Attributes:
        values: The object itself.
        prefix: Where the object is, for messages: "rope_scaling.".
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self.values = values
        self.prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __bool__(self) -> bool:
        return bool(self.values)

    def name(self, name: str) -> str:
        """Returns a field's name as messages spell it."""
        return self.prefix + name

    def integer(
        self,
        name: str,
        *,
        default: Any = _REQUIRED,
        minimum: int = 1,
        maximum: int = _MAX_INT,
    ) -> Any:
        """Returns an integer in a range; null is an error unless it is the default."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        # bool is a subclass of int, and `true` is no size.
        if type(value) is not int or not minimum <= value <= maximum:
            self._refuse(name, f"an integer in [{minimum}, {maximum}]", value)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns integers ≥ 0; one by itself is a list too, null an empty one."""
        value = self._get(name, None)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item <= _MAX_INT for item in items):
            self._refuse(name, "a list of integers that are not negative", value)
        return tuple(items)

    def number(
        self,
        name: str,
        *,
        default: Any = _REQUIRED,
        above: float = -math.inf,
        minimum: float = -math.inf,
    ) -> Any:
        """Returns a finite float in a range; null counts as absent."""
        value = self._get(name, default)
        if value is None and default is not _REQUIRED:
            return default
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not above < value
            or not minimum <= value
            or not abs(value) <= sys.float_info.max
        ):
            limit = f" > {above:g}" if above > -math.inf else ""
            limit += f" >= {minimum:g}" if minimum > -math.inf else ""
            self._refuse(name, f"a number{limit}", value)
        return float(value)

    def boolean(self, name: str, *, default: Any = _REQUIRED) -> bool:
        """Returns a boolean."""
        value = self._get(name, default)
        if type(value) is not bool:
            self._refuse(name, "true or false", value)
        return value

    def choice(
        self, name: str, options: tuple[str, ...], *, default: Any = _REQUIRED
    ) -> str:
        """Returns a string that is one of `options`."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in options:
            self._refuse(name, f"one of {', '.join(map(repr, options))}", value)
        return value

    def strings(self, name: str) -> list[str] | None:
        """Returns a list of strings, None if it is null or absent."""
        value = self._get(name, None)
        is_list = isinstance(value, list)
        if value is not None and not (
            is_list and all(isinstance(item, str) for item in value)
        ):
            self._refuse(name, "a list of strings", value)
        return value

    def fixed(self, name: str, supported: Any) -> None:
        """Refuses any value but one; null counts as absent."""
        value = self._get(name, None)
        if value is not None and value != supported:
            self._refuse(name, f"{supported!r}, the only supported value,", value)

    def nested(self, name: str) -> "Fields | None":
        """Returns an object inside this one, None if it is null or absent."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            self._refuse(name, "an object", value)
        return Fields(value, f"{self.name(name)}.")

    def empty(self, name: str) -> "Fields":
        """Returns what `nested` would for an object without fields."""
        return Fields({}, f"{self.name(name)}.")

    def is_null(self, name: str) -> bool:
        """Returns whether the field is there and null."""
        if name not in self.values or self.values[name] is not None:
            return False
        self._read.add(name)
        return True

    def refuse_unread(self, harmless: Collection[str], where: str) -> None:
        """Raises if there are fields that were neither read nor known as harmless."""
        unknown = sorted(set(self.values) - self._read - set(harmless))
        if unknown:
            names = ", ".join(repr(name[:_MAX_NAME])[1:-1] for name in unknown[:8])
            raise ConfigError(
                f"{names}: unknown {where}. A field that may change the model is not "
                "ignored; remove it if it does not."
            )

    def _get(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value: Any = self.values.get(name, default)
        if value is _REQUIRED:
            raise ConfigError(f"{self.name(name)} is missing.")
        return value

    def _refuse(self, name: str, expected: str, value: Any) -> NoReturn:
        raise ConfigError(
            f"{self.name(name)} must be {expected}, got {reprlib.repr(value)}."
        )
