"""The two elementwise ends of a guided sampling step (Ho et al. 2022, §3.1, Eqs. 7 and 8).

Let m be the network's output at z. Every estimate is linear in it, x_hat = p_z z + p_m m:

    L        = w_r ||x^a - x_hat^a||^2 + w_y ||y - D(x_hat)||^2      (sums over all elements)
    G        = dL/dz = (dm/dz)^T p_m r + p_z r,    r = dL/dx_hat
    x_tilde  = x_hat - (alpha/2) G                                  on unknown frames

``guidance_seed`` computes x_hat and seed = (alpha/2) p_m r, from which the network's backward pass
starts. ``guidance_update`` takes the result of that pass, adds the direct term (p_z/p_m) seed and
makes the step. alpha/2 is a factor of the seed to keep it in range near alpha = 0, where p_m is
1/alpha.
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

SEED_COEFFICIENTS = ("p_z", "p_m", "known_scale", "low_scale")
UPDATE_COEFFICIENTS = ("e_z", "e_m", "direct", "u_z", "u_x", "u_n", "k_z", "k_x", "k_n")


def _columns(coef: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(B, n) → n tensors (B, 1, 1, 1, 1)."""
    return [c.reshape(-1, 1, 1, 1, 1).to(dtype) for c in coef.unbind(1)]


def _scatter_frames(values: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """values (B, C, K, H, W), slot (F,) → values at their frames (0 elsewhere), mask (F, 1, 1)."""
    full = values[:, :, slot.clamp_min(0).long()]
    given = (slot >= 0)[:, None, None]
    return torch.where(given, full, 0), given


def guidance_seed_ref(
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
    """(x_hat, seed); arguments as in ``fastvdm.ops.guidance.guidance_seed``."""
    acc = torch.promote_types(z.dtype, torch.float32)
    p_z, p_m, known_scale, low_scale = _columns(coef, acc)
    raw = p_z * z + p_m * model_out.to(acc)
    x_hat = raw.clamp(-1, 1) if clip else raw
    seed = torch.zeros_like(x_hat)
    if known is not None and slot is not None:
        x_a, given = _scatter_frames(known.to(acc), slot)
        seed = torch.where(given, known_scale * 2 * (x_hat - x_a), 0)
    if low_res is not None and low_slot is not None:
        factor = z.shape[3] // low_res.shape[3]
        y, given = _scatter_frames(low_res.to(acc), low_slot)
        mean = reduce(
            x_hat, "b c f (h i) (w j) -> b c f h w", "mean", i=factor, j=factor
        )  # D is average pooling; its adjoint spreads a value evenly
        spread = torch.where(given, 2 * (mean - y) / factor**2, 0)
        seed = seed + low_scale * spread.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    if extra is not None:
        seed = seed + low_scale * extra.to(acc)
    if clip:
        seed = torch.where(raw.abs() <= 1, seed, 0)  # the gradient of clamp
    return x_hat.to(z.dtype), seed.to(model_out.dtype)


def guidance_update_ref(
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
) -> tuple[Tensor, Tensor]:
    """(x_tilde, z_next); arguments as in ``fastvdm.ops.guidance.guidance_update``."""
    acc = torch.promote_types(z.dtype, torch.float32)
    e_z, e_m, direct, u_z, u_x, u_n, k_z, k_x, k_n = _columns(coef, acc)
    wide = z.to(acc)
    x = e_z * wide + e_m * estimate.to(acc)
    if grad is not None:
        x = x - grad.to(acc)
        if seed is not None:
            x = x - direct * seed.to(acc)
    if clip:
        s = torch.ones_like(u_z) if threshold is None else threshold.to(acc).reshape(u_z.shape)
        x = torch.clamp(x, -s, s) / s
    if noise is not None:
        n = noise.to(acc)
    elif rng is not None:
        n = philox_normal(rng, step, tuple(z.shape[1:]), dtype=acc)
    else:
        n = torch.zeros_like(wide)
    z_next = u_z * wide + u_x * x + u_n * n
    if known is not None and slot is not None:
        x_a, given = _scatter_frames(known.to(acc), slot)
        x = torch.where(given, x_a, x)
        z_next = torch.where(given, k_z * wide + k_x * x_a + k_n * n, z_next)
    return x.to(z.dtype), z_next.to(z.dtype)


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a * b for 32-bit words held in int64.

    The product may exceed 2^63 and wrap, but its 64 bits are still correct.
    """
    product = a * b
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox_words(rng: Tensor, step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first two words of Philox-4x32-10 (Salmon et al. 2011), int64 holding 32 bits.

    The counter is (element lo, element hi, step, 0), the key is the 64 bits of ``rng`` (B,) int64,
    and element is the row-major index in ``shape``. A sample's noise depends only on its own seed
    and on the step. In rng (B, 2) the second column is added to ``step``: a count on the device.
    """
    place = rng.new_full((len(rng),), step)
    if rng.ndim == 2:
        rng, place = rng[:, 0], place + rng[:, 1]
    count = 1
    for n in shape:
        count *= n
    element = torch.arange(count, device=rng.device)[None]
    c0, c1 = (element & 0xFFFFFFFF).expand(len(rng), -1), element >> 32
    c2, c3 = (place & 0xFFFFFFFF)[:, None].expand_as(c0), torch.zeros_like(c0)
    k0, k1 = (rng & 0xFFFFFFFF)[:, None], ((rng >> 32) & 0xFFFFFFFF)[:, None]
    for _ in range(10):
        hi_b, lo_b = _mulhilo(0xCD9E8D57, c2)
        hi_a, lo_a = _mulhilo(0xD2511F53, c0)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0.reshape(len(rng), *shape), c1.reshape(len(rng), *shape)


def philox_normal(
    rng: Tensor, step: int, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal (B, *shape): Box-Muller on the two words, in ``dtype`` (fp32 or fp64).

    u = (top 23 bits + 1/2) 2^-23 is exact in fp32 and never 0, so every backend has the same u. The
    results differ in the last bits of log and cos. |n| <= 5.8.
    """
    a, b = philox_words(rng, step, shape)
    u1 = ((a >> 9).to(dtype) + 0.5) * 2.0**-23
    u2 = ((b >> 9).to(dtype) + 0.5) * 2.0**-23
    return torch.sqrt(-2 * torch.log(u1)) * torch.cos(6.283185307179586 * u2)
