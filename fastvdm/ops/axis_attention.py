"""Softmax attention along the time or the space axis of a video: contract, op, autograd.

    s_ij = sm_scale * (q_i·k_j + q_i·rel_k[j-i]) + bias_ij,   p = softmax_j(s)
    out_i = Σ_j p_ij (v_j + rel_v[j-i])

With dp_ij = dout_i·(v_j + rel_v[j-i]) and δ_i = Σ_j p_ij dp_ij the backward is
    ds = p (dp - δ),  dbias = Σ ds,  dq_i = sm_scale Σ_j ds_ij (k_j + rel_k[j-i]),
    dk_j = sm_scale Σ_i ds_ij q_i,  dv_j = Σ_i p_ij dout_i.
q and k of the first product carry the rotary embedding, q of the Shaw term does not.

Launchers (Triton: ``fastvdm.kernels.axis_attention``; C++: ``axis_attention_fwd_cpu`` …) take the
arguments of the two custom ops below without ``backend`` and may rely on: every tensor checked and
on one device; the last axis of ``qkv`` and ``dout`` has stride 1 and (H, W) walks with one stride
(``merged``), the other strides are free, 0 included; all other tensors contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.runtime.dispatch import ByDesign, autocast_dtype, launchers, register, select

TIME, SPACE = 1, 2  # the axis of (B, F, H, W, ...) at which the sequence starts
SHORT = 32  # up to here one tile holds all keys: the backward needs neither out nor lse

_AXES = {"time": TIME, "space": SPACE}
_NAMES = {code: name for name, code in _AXES.items()}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_DIM = 128


def merged(t: Tensor) -> bool:
    """Whether the last axis has stride 1 and the pixels (H, W) walk with one stride."""
    h, w = t.shape[2], t.shape[3]
    return t.stride(-1) == 1 and (h == 1 or w == 1 or t.stride(2) == w * t.stride(3))


def sequence(shape: torch.Size, axis: int) -> tuple[int, int]:
    """(N, outer): length of the sequence, and how many of them each video has per head."""
    _, f, h, w = shape[:4]
    return (f, h * w) if axis == TIME else (h * w, f)


@define
def axis_attention_fwd(
    qkv: Tensor,
    axis: int,
    bias: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    rotary: Tensor | None,
    focus_mask: Tensor | None,
    num_images: int,
    sm_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out (B, F, H, W, heads, D) contiguous, in the dtype of qkv; lse (B, outer, heads, N) =
    log Σ_j exp s_ij in the accumulator's dtype, empty (0,) where N <= SHORT. Rows of lse that
    belong to an image or to a focused sample are 0, empty rows (all -inf) +inf.

    axis: TIME or SPACE. bias (heads, N, N) in any floating dtype; rel_k, rel_v
    (1 or heads, 2R+1, D) in the dtype of qkv; rotary (2, N, R/2) fp32; focus_mask (B,) bool.
    """
    return launchers("axis_attention", backend).axis_attention_fwd(
        qkv, axis, bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale
    )


@fake(axis_attention_fwd)
def _(qkv, axis, bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale, backend):
    b, f, h, w, _, heads, d = qkv.shape
    n, outer = sequence(qkv.shape, axis)
    acc = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    lse = (b, outer, heads, n) if n > SHORT else (0,)
    return qkv.new_empty((b, f, h, w, heads, d)), qkv.new_empty(lse, dtype=acc)


@define
def axis_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    axis: int,
    bias: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    rotary: Tensor | None,
    focus_mask: Tensor | None,
    num_images: int,
    sm_scale: float,
    need_dqkv: bool,
    need_dbias: bool,
    need_drel_k: bool,
    need_drel_v: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dqkv packed and contiguous, dbias, drel_k, drel_v: each in shape and dtype of what it is the
    gradient of, accumulated in fp32 (fp64), or empty (0,) where not needed.

    out and lse are those of the forward; both empty (0,) where N <= SHORT.
    """
    return launchers("axis_attention", backend).axis_attention_bwd(
        *(dout, qkv, out, lse, axis, bias, rel_k, rel_v, rotary, focus_mask),
        *(num_images, sm_scale, need_dqkv, need_dbias, need_drel_k, need_drel_v),
    )


@fake(axis_attention_bwd)
def _(
    dout, qkv, out, lse, axis, bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale,
    need_dqkv, need_dbias, need_drel_k, need_drel_v, backend,
):  # fmt: skip
    def like(t, need):
        return qkv.new_empty(t.shape if need else (0,), dtype=(t if need else qkv).dtype)

    return (
        like(qkv, need_dqkv),
        like(bias, need_dbias),
        like(rel_k, need_drel_k),
        like(rel_v, need_drel_v),
    )


def _save(ctx, inputs, output):
    qkv, axis, bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    # One tile recomputes everything from q, k, v: keeping out alive would double what is saved.
    kept = out if lse.numel() else lse
    ctx.save_for_backward(qkv, kept, lse, bias, rel_k, rel_v, rotary, focus_mask)
    ctx.axis, ctx.num_images, ctx.sm_scale, ctx.backend = axis, num_images, sm_scale, backend


def _backward(ctx, dout, _dlse):
    qkv, out, lse, bias, rel_k, rel_v, rotary, focus_mask = ctx.saved_tensors
    need_dqkv, _, need_dbias, need_drel_k, need_drel_v = ctx.needs_input_grad[:5]
    dqkv, dbias, drel_k, drel_v = axis_attention_bwd(
        *(dout if merged(dout) else dout.contiguous(), qkv, out, lse, ctx.axis, bias),
        *(rel_k, rel_v, rotary, focus_mask, ctx.num_images, ctx.sm_scale),
        *(need_dqkv, need_dbias, need_drel_k, need_drel_v, ctx.backend),
    )
    return (
        dqkv if need_dqkv else None,
        None,
        dbias if need_dbias else None,
        drel_k if need_drel_k else None,
        drel_v if need_drel_v else None,
        *(None, None, None, None, None),
    )


autograd(axis_attention_fwd, _backward, setup_context=_save)
no_double_backward(axis_attention_bwd)


def unsupported(backend: str, qkv: Tensor) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    d = qkv.shape[-1]
    if d > _MAX_DIM:
        return f"head dim {d} is above {_MAX_DIM}"
    if backend == "cpu" and qkv.dtype == torch.float64:
        return ByDesign("fp64 runs on the torch reference")
    if backend == "triton" and qkv.dtype == torch.float64 and qkv.is_cuda:
        # Triton 3.6 fails to compile fp64 products of computed operands; interpreted they work.
        return ByDesign("fp64 runs on the torch reference")
    return None


register(
    "axis_attention",
    stem="axis_attention",
    names=("axis_attention_fwd", "axis_attention_bwd"),
    unsupported=unsupported,
    backends=("triton", "cpu"),
)


def _check_qkv(qkv: Tensor, axis: str) -> None:
    if axis not in _AXES:
        raise ValueError(f"axis must be 'space' or 'time', got {axis!r}")
    if qkv.ndim != 7 or qkv.shape[4] != 3:
        raise ValueError(f"qkv must be (B, F, H, W, 3, heads, D), got {tuple(qkv.shape)}")
    if qkv.dtype not in _DTYPES:
        raise TypeError(f"qkv must be fp32, fp16, bf16 or fp64, got {qkv.dtype}")


def _check_tensor(name: str, t: Tensor, shape: tuple[int, ...], qkv: Tensor) -> None:
    if t.device != qkv.device:
        raise ValueError(f"{name} must be on {qkv.device} like qkv, got {t.device}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")


def check_options(
    qkv_like: Tensor,
    shape: tuple[int, ...],
    axis: str,
    bias: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    rotary: Tensor | None,
    focus_mask: Tensor | None,
    num_images: int,
) -> None:
    """Check the options against qkv's ``shape`` (B, F, H, W, 3, heads, D); the device is that of
    ``qkv_like``. Shared with ``temporal_block``, which never forms qkv.

    Raises:
        ValueError: a shape, a device or a combination is wrong.
        TypeError: a dtype is wrong.
    """
    b, f, h, w, _, heads, d = shape
    n = f if axis == "time" else h * w
    if bias is not None:
        _check_tensor("bias", bias, (heads, n, n), qkv_like)
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}")
    for name, table in (("rel_k", rel_k), ("rel_v", rel_v)):
        if table is None:
            continue
        if table.ndim != 3 or table.shape[0] not in (1, heads) or table.shape[1] % 2 == 0:
            raise ValueError(f"{name} must be (1 or {heads}, 2R+1, {d}), got {tuple(table.shape)}")
        _check_tensor(name, table, (*table.shape[:2], d), qkv_like)
        if not table.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {table.dtype}")
    if rotary is not None:
        if rotary.ndim != 3 or not 0 < 2 * rotary.shape[-1] <= d:
            raise ValueError(
                f"rotary must be (2, {n}, R/2) with R in 2..{d}, got {tuple(rotary.shape)}"
            )
        _check_tensor("rotary", rotary, (2, n, rotary.shape[-1]), qkv_like)
        if rotary.dtype != torch.float32:
            raise TypeError(f"rotary must be fp32, got {rotary.dtype}")
    if focus_mask is not None:
        if axis != "time":
            raise ValueError("focus_mask needs axis='time'")
        _check_tensor("focus_mask", focus_mask, (b,), qkv_like)
        if focus_mask.dtype != torch.bool:
            raise TypeError(f"focus_mask must be bool, got {focus_mask.dtype}")
    if num_images:
        if axis != "time":
            raise ValueError("num_images needs axis='time'")
        if not 0 <= num_images <= f:
            raise ValueError(f"num_images must be within 0..{f} frames, got {num_images}")


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
    """Softmax attention along time (N = F, each pixel apart) or space (N = H*W, each frame apart).

    Args:
        qkv: (B, F, H, W, 3, heads, D), the packed output of one projection; read by strides, copied
            only if the pixels do not walk with one stride. fp32, fp16, bf16 or fp64.
        axis: "time" or "space" (pixels in row-major order).
        bias: (heads, N, N) [query, key], added to the scaled logits. -inf masks; a row of nothing
            but -inf gives zeros.
        rel_k, rel_v: Shaw vectors (1 or heads, 2R+1, D): row clip(j-i, -R, R) + R is added to key j
            (value j) as query i sees it. Under ``rotary`` rel_k meets the unrotated query.
        rotary: (2, N, R/2) cosines and sines in fp32; turns the pairs (2i, 2i+1) of the first R
            features of q and k. Not differentiated.
        focus_mask: (B,) bool, time only. True: the frames of this video attend to themselves only,
            out = v (+ rel_v of distance 0).
        num_images: K, time only. The last K frames are images that attend to themselves only, the
            first F-K attend to each other.
        sm_scale: factor on the logits before the bias; D**-0.5 by default.

    Returns:
        (B, F, H, W, heads, D) in the dtype of ``qkv`` (of autocast, where it is on).

    Raises:
        ValueError: a shape, a device or a combination of arguments is wrong.
        TypeError: a dtype is wrong.
    """
    _check_qkv(qkv, axis)
    check_options(qkv, tuple(qkv.shape), axis, bias, rel_k, rel_v, rotary, focus_mask, num_images)
    qkv = qkv.to(autocast_dtype(qkv))
    rel_k = None if rel_k is None else rel_k.to(qkv.dtype)
    rel_v = None if rel_v is None else rel_v.to(qkv.dtype)
    scale = qkv.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    code = _AXES[axis]
    backend = select("axis_attention", qkv.device, qkv)
    if backend == "reference":
        return axis_attention_ref(
            qkv,
            axis=axis,
            bias=bias,
            rel_k=rel_k,
            rel_v=rel_v,
            rotary=rotary,
            focus_mask=focus_mask,
            num_images=num_images,
            sm_scale=scale,
        )
    return axis_attention_fwd(
        qkv if merged(qkv) else qkv.contiguous(),
        code,
        None if bias is None else bias.contiguous(),
        None if rel_k is None else rel_k.contiguous(),
        None if rel_v is None else rel_v.contiguous(),
        None if rotary is None else rotary.detach().contiguous(),
        None if focus_mask is None else focus_mask.contiguous(),
        num_images,
        scale,
        backend,
    )[0]


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
    """Of one call on ``qkv`` of this shape; ``backward`` counts the backward alone.

    Forward: q, k, v read and out written once, two products of 2*N*D a row. Backward: q, k, v, dout
    read and dq, dk, dv written once, five products (without dqkv two); beyond one tile out is read
    too. Images pass v (its gradient) through. Shaw tables of ``rel_k`` and ``rel_v`` rows each add
    a product with as many of their rows as a query meets, and its gradients; they are too small for
    their bytes to count.
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
    """2R+1 of a Shaw table (T, 2R+1, D); 0 without one."""
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
