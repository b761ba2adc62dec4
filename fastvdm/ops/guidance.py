"""The two elementwise ends of a guided sampling step: contract, torch.library ops, cost.

``guidance_seed`` runs before the network's backward pass and ``guidance_update`` after it, or alone
in a step without guidance. Each is one kernel; the step has no other elementwise work. The formulas
are those of ``fastvdm.reference.guidance``. Every per-sample scalar of the schedule comes in a row
of a (B, n) table, so a step never waits for the host. Neither op has a gradient: sampling needs
none, and a backward through them raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._call import check_tensors, run, select, wrong_form
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, op
from fastvdm.reference.guidance import (
    SEED_COEFFICIENTS,
    UPDATE_COEFFICIENTS,
    guidance_seed_ref,
    guidance_update_ref,
)
from fastvdm.runtime.dispatch import FP64, Implementations, implementations

_STATE = (torch.float32, torch.float64)


@op("guidance", strided="model_out")
def guidance_seed_fwd(
    z: Tensor,
    model_out: Tensor,
    coef: Tensor,
    known: Tensor | None,
    slot: Tensor | None,
    low_res: Tensor | None,
    low_slot: Tensor | None,
    extra: Tensor | None,
    clip: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x_hat, contiguous, in the dtype of z; seed, in the dtype and strides of model_out."""
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(model_out)


@op("guidance", strided="estimate grad seed")
def guidance_update_fwd(
    z: Tensor,
    estimate: Tensor,
    coef: Tensor,
    grad: Tensor | None,
    seed: Tensor | None,
    known: Tensor | None,
    slot: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    threshold: Tensor | None,
    step: int,
    clip: bool,
    want_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(x_tilde, z_next), both contiguous in the dtype of z; x_tilde is empty unless ``want_x``."""
    z_next = torch.empty_like(z, memory_format=torch.contiguous_format)
    return (torch.empty_like(z_next) if want_x else z.new_empty(0)), z_next


def _no_backward(ctx, *_):
    raise RuntimeError(
        "guidance_seed and guidance_update have no backward; to differentiate through a sampling "
        "step run it under fastvdm.use_backend('reference')"
    )


autograd(guidance_seed_fwd, _no_backward)
autograd(guidance_update_fwd, _no_backward)


def _examples(device: torch.device) -> dict[str, tuple]:
    return {"fp32": (torch.empty(1, device=device),) * 2}


for _op in ("guidance_seed", "guidance_update"):

    @implementations(_op, f"{_op}_fwd", examples=_examples)
    def _(z: Tensor, other: Tensor) -> Implementations:
        fp64 = torch.float64 in (z.dtype, other.dtype)
        yield "cpu", FP64 if fp64 else None
        yield "triton", None


def _check_state(z: Tensor, other: Tensor, name: str, coef: Tensor, names: tuple[str, ...]) -> None:
    if getattr(z, "ndim", 0) != 5:
        raise wrong_form("z", z, "(B, C, F, H, W)")
    check_tensors(z, ("z", z, tuple(z.shape)), dtypes=_STATE)
    check_tensors(z, (name, other, tuple(z.shape)), beside="z")
    if getattr(coef, "shape", None) != (z.shape[0], len(names)):
        raise wrong_form("coef", coef, f"({z.shape[0]}, {len(names)}): {', '.join(names)}")
    check_tensors(z, ("coef", coef, tuple(coef.shape)), beside="z", dtypes=(z.dtype,))


def _check_frames(z: Tensor, values: Tensor | None, slot: Tensor | None, name: str) -> int:
    """The downsampling factor of ``values``. The slots stay on the device and are not read."""
    if (values is None) != (slot is None):
        raise ValueError(f"{name} and its slot come together")
    if values is None or slot is None:
        return 1
    b, c, f, h, w = z.shape
    if getattr(values, "ndim", 0) != 5:
        raise wrong_form(name, values, f"({b}, {c}, K, ...)")
    factor = h // values.shape[3] if 0 < values.shape[3] <= h else 0
    expected = (b, c, values.shape[2], h // max(factor, 1))
    if (
        factor == 0
        or values.shape[:2] != (b, c)
        or values.shape[3] * factor != h
        or values.shape[4] * factor != w
        or (name == "known" and factor != 1)
    ):
        raise ValueError(f"{name} must be {expected} and square factors, got {tuple(values.shape)}")
    check_tensors(z, (f"{name}'s slot", slot, (f,)), beside="z", dtypes=(torch.int32,))
    check_tensors(z, (name, values, tuple(values.shape)), beside="z", dtypes=(z.dtype,))
    return factor


def guidance_seed(
    z: Tensor,
    model_out: Tensor,
    coef: Tensor,
    *,
    known: Tensor | None = None,
    slot: Tensor | None = None,
    low_res: Tensor | None = None,
    low_slot: Tensor | None = None,
    extra: Tensor | None = None,
    clip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Before the network's backward pass: from its output to x_hat and the seed of that pass.

    Ho et al. 2022, §3.1, Eqs. 7 and 8; the formulas are in ``fastvdm.reference.guidance``.

    Args:
        z: (B, C, F, H, W) fp32 or fp64.
        model_out: the network's output at z, any strides, fp32/fp16/bf16/fp64.
        coef: (B, 4) p_z, p_m, known_scale, low_scale in the dtype of z: x_hat = p_z z + p_m
            model_out; the scales are p_m alpha/2 times the weight of each squared error.
        known: (B, C, K, H, W) known frames.
        slot: (F,) int32, the index of each frame in ``known``, or -1 for an unknown frame.
        low_res: (B, C, L, H/k, W/k) a low-resolution video. D is average pooling over k x k; the
            kernel computes its adjoint.
        low_slot: (F,) int32, the index of each frame in ``low_res``, or -1.
        extra: (B, C, F, H, W) d||y - D(x_hat)||^2/dx_hat of any other D, from autograd.
        clip: clamp x_hat to [-1, 1] before the loss; saturated elements then get no gradient.

    Returns:
        x_hat (contiguous, dtype of z) and seed (dtype and strides of model_out): alpha/2 times the
        gradient of the weighted squared errors with respect to ``model_out``.

    Raises:
        ValueError: shapes or slots do not fit.
        TypeError: dtypes do not fit.
    """
    _check_state(z, model_out, "model_out", coef, SEED_COEFFICIENTS)
    _check_frames(z, known, slot, "known")
    _check_frames(z, low_res, low_slot, "low_res")
    check_tensors(z, ("extra", extra, tuple(z.shape)), beside="z")
    which = select("guidance_seed", z.device, z, model_out)
    if which == "reference":
        return guidance_seed_ref(
            z, model_out, coef, known=known, slot=slot, low_res=low_res, low_slot=low_slot,
            extra=extra, clip=clip,
        )  # fmt: skip
    extra = extra.to(z.dtype) if extra is not None else None
    return run(
        guidance_seed_fwd, z, model_out, coef, known, slot,
        low_res, low_slot, extra, clip, which,
    )  # fmt: skip


def guidance_update(
    z: Tensor,
    estimate: Tensor,
    coef: Tensor,
    *,
    grad: Tensor | None = None,
    seed: Tensor | None = None,
    known: Tensor | None = None,
    slot: Tensor | None = None,
    noise: Tensor | None = None,
    rng: Tensor | None = None,
    step: int = 0,
    threshold: Tensor | None = None,
    clip: bool = False,
    want_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """After the network's backward pass: the guided, clipped x_tilde and the next, noisy z.

    x = e_z z + e_m estimate - grad - direct seed, clamped to [-s, s] and divided by s if ``clip``;
    z_next = u_z z + u_x x + u_n noise. On known frames x is the known frame and z_next = k_z z +
    k_x x + k_n noise (the replacement). Ancestral, DDIM and Langevin steps differ only in ``coef``.

    Args:
        z: (B, C, F, H, W) fp32 or fp64.
        estimate: x_hat, or the network's output, which e_z and e_m turn into x_hat; any strides.
        coef: (B, 9) e_z, e_m, direct, u_z, u_x, u_n, k_z, k_x, k_n.
        grad: the gradient of the network's input, started from ``seed``, any strides; None without
            guidance.
        seed: required if D(x_hat) depends on z directly (low resolution); direct = p_z/p_m.
        known: as in ``guidance_seed``.
        slot: as in ``guidance_seed``.
        noise: (B, C, F, H, W). Without ``noise`` and ``rng`` there is no noise.
        rng: (B,) int64 seeds of Philox-4x32-10, which gives the same words on every backend. In
            (B, 2) the second column is added to ``step``, so that a CUDA graph can count.
        step: position in the streams of ``rng``.
        threshold: (B,) the s of dynamic clipping; 1 by default.
        clip: clamp x.
        want_x: return x_tilde; otherwise an empty tensor is returned in its place.

    Returns:
        (x_tilde, z_next), contiguous, in the dtype of z.

    Raises:
        ValueError: shapes or slots do not fit, or ``noise`` and ``rng`` are both given.
        TypeError: dtypes do not fit.
    """
    _check_state(z, estimate, "estimate", coef, UPDATE_COEFFICIENTS)
    _check_frames(z, known, slot, "known")
    shape = tuple(z.shape)
    check_tensors(
        z, ("grad", grad, shape), ("seed", seed, shape), ("noise", noise, shape), beside="z"
    )
    if seed is not None and grad is None:
        raise ValueError("seed is the direct term of a gradient: it needs grad")
    if noise is not None and rng is not None:
        raise ValueError("give noise or rng, not both")
    b = z.shape[0]
    if rng is not None:
        if getattr(rng, "shape", None) not in ((b,), (b, 2)):
            raise wrong_form("rng", rng, f"({b},) or ({b}, 2)")
        check_tensors(z, ("rng", rng, tuple(rng.shape)), beside="z", dtypes=(torch.int64,))
    check_tensors(z, ("threshold", threshold, (b,)), beside="z")
    which = select("guidance_update", z.device, z, estimate)
    if which == "reference":
        return guidance_update_ref(
            z, estimate, coef, grad=grad, seed=seed, known=known, slot=slot, noise=noise, rng=rng,
            step=step, threshold=threshold, clip=clip,
        )  # fmt: skip
    # With an fp32 state no kernel reads fp64.
    grad, seed = (
        t if t is None or t.dtype != torch.float64 else t.to(z.dtype) for t in (grad, seed)
    )
    noise = noise.to(z.dtype) if noise is not None else None
    threshold = threshold.to(z.dtype) if threshold is not None else None
    return run(
        guidance_update_fwd, z, estimate, coef, grad, seed, known,
        slot, noise, rng, threshold, step, clip, want_x, which,
    )  # fmt: skip


def guidance_seed_cost(
    shape: tuple[int, ...], itemsize: int = 4, *, known: int = 0, low_res: int = 0
) -> Cost:
    """Reads z and model_out, writes x_hat and seed. ``known``, ``low_res``: given frames."""
    b, c, f, h, w = shape
    n = b * c * f * h * w
    given = b * c * h * w * known
    return Cost(flops=3 * n + 3 * given, bytes=(2 * n + given) * 4 + 2 * n * itemsize + 4 * low_res)


def guidance_update_cost(shape: tuple[int, ...], itemsize: int = 4, *, guided: bool = True) -> Cost:
    """Reads z, x_hat and the gradient, writes z_next. Per element about 100 integer operations of
    Philox and 8 floating-point operations."""
    b, c, f, h, w = shape
    n = b * c * f * h * w
    return Cost(flops=(8 + 2 * guided) * n, bytes=2 * n * 4 + (1 + guided) * n * itemsize)


@flops(guidance_seed_fwd, guidance_update_fwd)
def _(**_):
    return 0  # elementwise: no products, see ``fastvdm.ops._cost``
