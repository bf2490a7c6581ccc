"""The C++ kernels: addresses and lengths in, nothing checked. Call them through pycircuit.ops."""

Weights = tuple[int, int, int, int, int, int, int]
Sparse = tuple[int, int, int, int]

compiler: str

class EncodeResult:
    @property
    def count(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    def copy(self, row_ptr: int, index: int, value: int) -> None: ...

def cuda() -> tuple[int, int, list[tuple[str, int, int, int, int]]] | None: ...
def isas() -> list[tuple[str, bool]]: ...
def multiply_adds(isa: int, rounds: int, threads: int, /) -> tuple[float, float]: ...
def stream_read(isa: int, data: int, count: int, threads: int, /) -> tuple[float, float]: ...
def encode(
    isa: int,
    x: int,
    positions: int,
    width: int,
    x_stride: int,
    w_enc: Weights,
    b_enc: int,
    threshold: int,
    threshold_stride: int,
    top_k: int,
    keep_negative: bool,
    first_position: int,
    threads: int,
    /,
) -> EncodeResult: ...
def decode(isa: int, features: Sparse, w_dec: Weights, bias: int, out: int, threads: int, /) -> None: ...
def attend_back(
    isa: int,
    y: int,
    prefix_ptr: int,
    targets: int,
    heads: int,
    kv_heads: int,
    width: int,
    z: int,
    pattern: int,
    positions: int,
    query: int,
    key: int,
    log_sum_exp: int,
    qk_width: int,
    scale: float,
    softcap: float,
    window: int,
    threads: int,
    parts: int,
    /,
) -> None: ...
def edge_scores(
    isa: int,
    gradient: int,
    gradient_stride: int,
    prefix_ptr: int,
    targets: int,
    features: Sparse,
    w_dec: Weights,
    out: int,
    out_stride: int,
    threads: int,
    /,
) -> None: ...
def influence(
    isa: int,
    rows: int,
    count: int,
    columns: int,
    row_stride: int,
    node: int,
    weight: int,
    order: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def reconstruct(
    isa: int,
    features: Sparse,
    w_dec: int,
    w_dec_stride: int,
    width: int,
    bias: int,
    target: int,
    target_stride: int,
    scale: float,
    gradient: int,
    value_gradient: int,
    squares: int,
    threads: int,
    /,
) -> None: ...
def adam(
    isa: int,
    weight: int,
    mean: int,
    square: int,
    gradient: Sparse,
    source: int,
    source_stride: int,
    width: int,
    rate: float,
    mean_share: float,
    square_share: float,
    correction: float,
    epsilon: float,
    threads: int,
    /,
) -> None: ...
def product(
    isa: int,
    a: int,
    rows: int,
    depth: int,
    a_stride: int,
    b: int,
    columns: int,
    b_stride: int,
    b_transposed: bool,
    divisor: int,
    out: int,
    out_stride: int,
    add: bool,
    threads: int,
    parts: int,
) -> None: ...
