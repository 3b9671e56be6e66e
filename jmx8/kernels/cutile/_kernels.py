"""FlashInfer's cuTile kernels for the W8A16 MXFP8 MoE, as they are declared there.

They are private functions, so this holds for one version of FlashInfer only; a test
compares every declaration with the function itself.
"""

from ._launch import Constant, In, Kernel, Out, Parameter, Scalar, Unused


_INT, _FLOAT, _BOOL = Constant(int), Constant(float), Constant(bool)


def _kernel(module: str, function: str, **parameters: Parameter) -> Kernel:
    return Kernel(module, function, parameters)


def _widened(kernel: Kernel, *names: str) -> Kernel:
    """Returns the variant that indexes the arrays `names` with 64 bits."""
    parameters = {
        name: parameter._replace(wide=True) if name in names else parameter
        for name, parameter in kernel.parameters.items()
    }
    return Kernel(kernel.module, f"{kernel.function}_i64", parameters)


PERMUTE_SMALL = _kernel(
    "moe",
    "_permute_small",
    TOPK_IDS=In("t"),
    SORTED_SLOTS=Out("t"),
    BLOCK_EXPERT=Out("t"),
    NUM_POST_PAD=Out("t"),
    numel=Scalar(),
    em=Scalar(),
    num_blocks=Scalar(),
    E=_INT,
    EPOW2=_INT,
    CHUNK_SIZE=_INT,
    NBPOW2=_INT,
    BLOCK_SIZE=_INT,
)

PERMUTE_CHUNK_RANK = _kernel(
    "moe",
    "_permute_chunk_rank",
    TOPK_IDS=In("t"),
    RANKS=Out("t"),
    HIST=Out("t"),
    numel=Scalar(),
    EPOW2=_INT,
    CHUNK_SIZE=_INT,
)

PERMUTE_SCAN = _kernel(
    "moe",
    "_permute_scan",
    HIST=In("t"),
    PAD_OFFSETS=Out("t"),
    BASE=Out("t"),
    NUM_POST_PAD=Out("t"),
    BLOCK_EXPERT=Out("t"),
    num_blocks=Scalar(),
    E=_INT,
    EPOW2=_INT,
    CHUNKS_PER_SLAB=_INT,
    NUM_SLABS=_INT,
    BLOCK_SIZE=_INT,
    NBPOW2=_INT,
)

PERMUTE_SCAN_PARTIALS = _kernel(
    "moe",
    "_permute_scan_partials",
    HIST=In("t"),
    SLAB_TOTALS=Out("t"),
    EPOW2=_INT,
    CHUNKS_PER_SLAB=_INT,
)

PERMUTE_SCAN_COMBINE = _kernel(
    "moe",
    "_permute_scan_combine",
    SLAB_TOTALS=Out("t"),
    PAD_OFFSETS=Out("t"),
    NUM_POST_PAD=Out("t"),
    E=_INT,
    EPOW2=_INT,
    NUM_SLABS=_INT,
    BLOCK_SIZE=_INT,
)

PERMUTE_SCAN_BASES = _kernel(
    "moe",
    "_permute_scan_bases",
    HIST=In("t"),
    SLAB_TOTALS=In("t"),
    BASE=Out("t"),
    EPOW2=_INT,
    CHUNKS_PER_SLAB=_INT,
)

PERMUTE_SCATTER = _kernel(
    "moe",
    "_permute_scatter",
    TOPK_IDS=In("t"),
    RANKS=In("t"),
    BASE=In("t"),
    SORTED_SLOTS=Out("t"),
    numel=Scalar(),
    EPOW2=_INT,
    CHUNK_SIZE=_INT,
)

PERMUTE_BLOCK_EXPERT = _kernel(
    "moe",
    "_permute_block_expert",
    PAD_OFFSETS=In("t"),
    BLOCK_EXPERT=Out("t"),
    BLOCK_SIZE=_INT,
)

PACK = _kernel(
    "fp8",
    "_pack_sorted",
    X=In("tm"),
    XS=Unused(),
    SLOTS=In("t"),
    OUT=Out("tm"),
    OS=Unused(),
    TOP_K=_INT,
    MX=_BOOL,
)
PACK_WIDE = _widened(PACK, "X", "XS", "OUT", "OS")

GEMM = _kernel(
    "fp8",
    "_sorted_grouped",
    X=In("tm"),
    XS=Unused(),
    W=In("tmm"),
    WS=In("tmm"),
    EXPERTS=In("t"),
    POST_PAD=In("t"),
    SLOTS=In("t"),
    OUT=Out("tm"),
    AMAX_PARTIAL=Unused(),
    TM=_INT,
    TN=_INT,
    TK=_INT,
    A8=_BOOL,
    MX=_BOOL,
    W4=_BOOL,
    BF16_DEQUANT=_BOOL,
    GATED=_BOOL,
    ACT=_INT,
    P1=_FLOAT,
    P2=_FLOAT,
    P3=_FLOAT,
    SCATTER=_BOOL,
    WRITE_AMAX=_BOOL,
    GRID_N=_INT,
    assignments=Scalar(),
)
GEMM_WIDE = _widened(GEMM, "X", "XS", "W", "WS", "OUT")

ACTIVATION = _kernel(
    "activation",
    "_gated_activation",
    X=In("tm"),
    OUT=Out("tm"),
    activation_type=_INT,
    param1=_FLOAT,
    param2=_FLOAT,
    param3=_FLOAT,
    I=_INT,
    TILE_I=_INT,
    NUM_TILES=_INT,
)
ACTIVATION_WIDE = _widened(ACTIVATION, "X", "OUT")

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Kernel))
