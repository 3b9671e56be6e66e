"""Conversion of weights that are in memory: pytrees and Equinox models."""

from ._leaf import (
    convert_leaf as convert_leaf,
    count_nonfinite as count_nonfinite,
    kept_row as kept_row,
    quantize_leaf as quantize_leaf,
)
from ._patterns import (
    compile_patterns as compile_patterns,
    PathPattern as PathPattern,
    Pattern as Pattern,
    Patterns as Patterns,
)
from ._rules import Contract as Contract, DEFAULT_SKIP as DEFAULT_SKIP
from .model import quantize_model as quantize_model
from .params import quantize_params as quantize_params
from .report import (
    combine_pieces as combine_pieces,
    measure as measure,
    measure_piece as measure_piece,
    Piece as Piece,
    Report as Report,
    ReportRow as ReportRow,
    Statistics as Statistics,
)
