"""Softmax attention along the time or the space axis of a video: contract, op, autograd.

    s_ij = sm_scale * (q_i·k_j + q_i·rel_k[j-i]) + bias_ij,   p = softmax_j(s)
    out_i = Σ_j p_ij (v_j + rel_v[j-i])

With dp_ij = dout_i·(v_j + rel_v[j-i]) and δ_i = Σ_j p_ij dp_ij the backward is
    ds = p (dp - δ),  dbias = Σ ds,  dq_i = sm_scale Σ_j ds_ij (k_j + rel_k[j-i]),
    dk_j = sm_scale Σ_i ds_ij q_i,  dv_j = Σ_i p_ij dout_i.
Rotary embedding is applied to q and k of the first product, but not to q of the Shaw term.

Launchers (Triton: ``fastvdm.kernels.axis_attention``; C++: ``axis_attention_fwd_cpu`` …) take the
arguments of the two custom ops below without ``backend``. They may rely on this: every tensor is
checked and on one device; the last axis of ``qkv`` and ``dout`` has stride 1, and consecutive
pixels of (H, W) have one stride (``merged``); their other strides are arbitrary, 0 included; all
other tensors are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels import axis_attention_library as library
from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.limits import SHORT, SPACE, TIME
from fastvdm.ops._call import autocast_dtype, check_tensors, run, select, wrong_form
from fastvdm.ops._check import check_options
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.runtime.dispatch import FP64, ByDesign, ByName, Implementations, implementations

_AXES = {"time": TIME, "space": SPACE}
_NAMES = {code: name for name, code in _AXES.items()}
_MAX_DIM = 128
_NONE = AttentionOptions()


def merged(t: Tensor) -> bool:
    """Whether the last axis has stride 1 and consecutive pixels of (H, W) have one stride."""
    h, w = t.shape[2], t.shape[3]
    return t.stride(-1) == 1 and (h == 1 or w == 1 or t.stride(2) == w * t.stride(3))


def sequence(shape: torch.Size, axis: int) -> tuple[int, int]:
    """(N, outer): the length of a sequence, and the number of sequences per video and head."""
    _, f, h, w = shape[:4]
    return (f, h * w) if axis == TIME else (h * w, f)


def _unsaved(values: dict) -> dict:
    """One tile recomputes everything from q, k, v; saving out would double what is saved."""
    return values if values["lse"].numel() else values | {"out": values["lse"]}


@op(
    "axis_attention",
    outputs="out lse",
    backward="dout qkv out lse axis options sm_scale",
    grads="qkv:dqkv bias:dbias rel_k:drel_k rel_v:drel_v",
    strided="qkv",
    # contiguous() would leave an empty tensor with the strides of an expanded gradient.
    seed=lambda d: d if merged(d) else d.clone(memory_format=torch.contiguous_format),
    unsaved=_unsaved,
)
def axis_attention_fwd(
    qkv: Tensor, axis: int, options: AttentionOptions, sm_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """out (B, F, H, W, heads, D), contiguous, in the dtype of qkv; and, in the accumulator's dtype,
    lse (B, outer, heads, 1, N) = log2 Σ_j exp s_ij. With a bias it is (B, outer, heads, 2, N):
    m_i = max_j s_ij and log2 Σ_j exp(s_ij - m_i), which would vanish in their sum beside a bias of
    -1e9 on all keys. Rows are 0 for images and focused samples; 0 and +inf where all is -inf. lse
    is empty (0,) if N <= SHORT, and from the C++ kernels, whose backward computes the softmax anew.

    axis is TIME or SPACE. The Shaw tables of ``options`` are in the dtype of qkv.
    """
    b, f, h, w, _, heads, d = qkv.shape
    n, outer = sequence(qkv.shape, axis)
    acc = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    parts = 1 if options.bias is None else 2
    shape = (b, outer, heads, parts, n) if n > SHORT and backend == "triton" else (0,)
    return qkv.new_empty((b, f, h, w, heads, d)), qkv.new_empty(shape, dtype=acc)


axis_attention_bwd = backward_of(axis_attention_fwd)


def _examples(device: torch.device) -> dict[str, tuple]:
    return {"fp32": (torch.empty(1, 1, 1, 1, 3, 1, 32, device=device),)}


def _by_torch(qkv: Tensor, axis: int, options: AttentionOptions) -> bool:
    """Whether torch's fused attention takes a call that our kernel could take: over space, in 16
    bits, without gradients. Estimates for sm_90, NOT MEASURED: at N=1024 cuDNN's forward reaches
    about 390 TFLOP/s, ours 250-300. Its faster backward would be spent on stacking dq, dk and dv,
    which ours writes in place, and two runs of it would differ in their bits."""
    if axis != SPACE or not qkv.is_cuda or qkv.element_size() != 2:
        return False
    if options != _NONE:
        return False
    if torch.is_grad_enabled() and qkv.requires_grad:
        return False
    _, _, h, w, _, _, d = qkv.shape
    fits = h * w > 64 and _on_grid(qkv, axis)  # up to 64 pixels our kernel has a single tile
    return fits and d % 8 == 0 and not torch.are_deterministic_algorithms_enabled()


def _on_grid(qkv: Tensor, axis: int) -> bool:
    """Whether the number of sequences fits one axis of a CUDA grid, as other kernels need it."""
    b, f, h, w, _, heads, _ = qkv.shape
    return b * heads * (f if axis == SPACE else h * w) <= 65535


@implementations("axis_attention", "axis_attention_fwd", "axis_attention_bwd", examples=_examples)
def _(qkv: Tensor, axis: int = TIME, options: AttentionOptions = _NONE) -> Implementations:
    d, fp64 = qkv.shape[-1], qkv.dtype == torch.float64
    wide = f"head dim {d} is above {_MAX_DIM}" if d > _MAX_DIM else None
    yield "cpu", wide or (FP64 if fp64 else None)
    if wide and qkv.is_cuda and options._replace(bias=None) == _NONE and _on_grid(qkv, axis):
        # One head of that size fills the registers of our kernel. xformers and torch have the same
        # kernels for a bias; without one xformers has FlashAttention 3 on Hopper.
        yield "triton", ByDesign(wide)
        absent = ByDesign("not installed: pip install 'fastvdm[xformers]'")
        yield "xformers", None if library.HAS_XFORMERS and not fp64 else absent
        yield "torch", None
    elif not wide and _by_torch(qkv, axis, options):
        yield "triton", ByName("torch's fused attention is ahead of it without options")
        yield "torch", None
    else:
        # Triton 3.6 cannot compile fp64 products of computed operands; its interpreter can.
        yield "triton", wide or (FP64 if fp64 and qkv.is_cuda else None)


def axis_attention(
    qkv: Tensor,
    *,
    axis: str,
    bias: Tensor | None = None,
    rel_k: Tensor | None = None,
    rel_v: Tensor | None = None,
    rotary: Tensor | None = None,
    focus_mask: Tensor | None = None,
    num_images: int = 0,
    sm_scale: float | None = None,
) -> Tensor:
    """Softmax attention along time (N = F, per pixel) or space (N = H*W, per frame).

    Ho et al. 2022, "Video Diffusion Models", section 3.

    Args:
        qkv: (B, F, H, W, 3, heads, D), the packed output of one projection, fp32, fp16, bf16 or
            fp64. Strides are arbitrary; it is copied only if consecutive pixels do not have one
            stride.
        axis: "time" or "space" (pixels in row-major order).
        bias: see ``AttentionOptions``.
        rel_k: see ``AttentionOptions``.
        rel_v: see ``AttentionOptions``.
        rotary: see ``AttentionOptions``.
        focus_mask: see ``AttentionOptions``.
        num_images: see ``AttentionOptions``.
        sm_scale: factor on the logits before the bias; D**-0.5 by default.

    Returns:
        (B, F, H, W, heads, D) in the dtype of ``qkv``, or of autocast if it is on.

    Raises:
        ValueError: a shape, a device or a combination of arguments is wrong.
        TypeError: a dtype is wrong.
    """
    options = AttentionOptions(bias, rel_k, rel_v, rotary, focus_mask, num_images)
    return attend(qkv, axis, options, sm_scale)


def attend(
    qkv: Tensor, axis: str, options: AttentionOptions, sm_scale: float | None = None
) -> Tensor:
    """``axis_attention`` with its options in one value."""
    if axis not in _AXES:
        raise ValueError(f"axis must be 'space' or 'time', got {axis!r}")
    if getattr(qkv, "ndim", 0) != 7 or qkv.shape[4] != 3:
        raise wrong_form("qkv", qkv, "(B, F, H, W, 3, heads, D)")
    check_tensors(qkv, ("qkv", qkv, qkv.shape))
    low = autocast_dtype(qkv)
    options = check_options(qkv, tuple(qkv.shape), axis, options, low, "qkv")
    qkv = qkv.to(low)
    scale = qkv.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    which = select("axis_attention", qkv.device, qkv, _AXES[axis], options)
    if which == "reference":
        return axis_attention_ref(qkv, axis=axis, sm_scale=scale, **options._asdict())
    if which in ("torch", "xformers"):
        call = library.by_torch if which == "torch" else library.by_xformers
        return call(qkv, _AXES[axis], options.bias, scale)
    qkv = qkv if merged(qkv) else qkv.contiguous()
    return run(axis_attention_fwd, qkv, _AXES[axis], *options, scale, which)[0]


def axis_attention_cost(
    shape: tuple[int, ...],
    itemsize: int,
    axis: str,
    *,
    bias: bool = False,
    num_images: int = 0,
    backward: bool = False,
    rel_k: int = 0,
    rel_v: int = 0,
    need_dqkv: bool = True,
    need_drel_k: bool = True,
    need_drel_v: bool = True,
) -> Cost:
    """The cost of one call on ``qkv`` of this shape; ``backward`` counts the backward alone.

    Forward: reads q, k, v and writes out once; two products of 2*N*D per row. Backward: reads q, k,
    v, dout and writes dq, dk, dv; five products (two without dqkv); beyond one tile it also reads
    out. Images only copy v (or its gradient). Shaw tables of ``rel_k`` and ``rel_v`` rows each add
    a product with as many of their rows as a query meets, and its gradients; their bytes are too
    few to count.
    """
    b, f, h, w, _, heads, d = shape
    n, outer = (f - num_images, h * w) if axis == "time" else (h * w, f)
    rows, images = b * outer * heads * n, b * h * w * heads * num_images
    table = heads * n * n * 4 if bias else 0
    met_k, met_v = min(rel_k, n), min(rel_v, n)
    if backward:
        products = (2 + 3 * need_dqkv) * n
        products += (1 + need_dqkv + need_drel_k) * met_k + (1 + need_drel_v) * met_v
        moved = rows * (7 + (n > SHORT)) + images * 4
        return Cost(flops=2 * products * rows * d, bytes=moved * d * itemsize + 2 * table)
    moved = (rows * 4 + images * 2) * d * itemsize
    return Cost(flops=2 * (2 * n + met_k + met_v) * rows * d, bytes=moved + table)


def table_rows(shape: tuple[int, ...] | None) -> int:
    """The rows 2R+1 of a Shaw table (T, 2R+1, D); 0 without one."""
    return 0 if shape is None else shape[1]


@flops(axis_attention_fwd)
def _(*, qkv, axis, rel_k, rel_v, num_images, **_):
    return axis_attention_cost(
        qkv, 4, _NAMES[axis], num_images=num_images, rel_k=table_rows(rel_k),
        rel_v=table_rows(rel_v),
    )  # fmt: skip


@flops(axis_attention_bwd)
def _(*, qkv, axis, rel_k, rel_v, num_images, need_dqkv, need_drel_k, need_drel_v, **_):
    return axis_attention_cost(
        qkv, 4, _NAMES[axis], num_images=num_images, rel_k=table_rows(rel_k),
        rel_v=table_rows(rel_v), backward=True, need_dqkv=need_dqkv, need_drel_k=need_drel_k,
        need_drel_v=need_drel_v,
    )  # fmt: skip
