"""Conversion errors of parameters that are never in memory unconverted as a whole."""

import math

from jaxtyping import Array

from .._mx_array import MXArray
from .._numerics import E8M0_BIAS
from ..convert import Statistics
from ..convert.report import _decibels, _measure_piece, _Piece


class Collector:
    """Adds up the statistics of every parameter from chunks of its rows."""

    def __init__(self):
        self._pieces: dict[str, list[_Piece]] = {}

    def add(self, path: str, x: Array, w: MXArray) -> None:
        """Measures some rows of a parameter and their quantized form."""
        self._pieces.setdefault(path, []).append(_measure_piece(x, w))

    def statistics(self, path: str) -> Statistics | None:
        """Returns the statistics of all rows of a parameter, None if there are none."""
        pieces = self._pieces.get(path)
        if not pieces:
            return None
        amax = max(piece.amax for piece in pieces)
        # Sums of a piece are relative to its own amax.
        factors = [(p.amax / amax) ** 2 if p.amax < amax else 1.0 for p in pieces]
        signal = math.fsum(p.signal * f for p, f in zip(pieces, factors, strict=True))
        noise = math.fsum(p.noise * f for p, f in zip(pieces, factors, strict=True))
        codes = [code for piece in pieces for code in piece.codes]
        return Statistics(
            sqnr_db=_decibels(signal, noise),
            amax=amax,
            exponent_min=min(codes) - E8M0_BIAS if codes else None,
            exponent_max=max(codes) - E8M0_BIAS if codes else None,
        )
