"""One sampling run: its noise, its state and the effect of a step (Ho et al. 2022, §2, §3.1)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion.denoiser import Denoiser
from fastvdm.diffusion.given import Given
from fastvdm.diffusion.graphs import DeviceNoise
from fastvdm.diffusion.plan import Plan, Row
from fastvdm.ops.guidance import guidance_seed, guidance_update


class Noise:
    """Standard normals from a torch generator, or (seed, counter) pairs for in-kernel Philox."""

    def __init__(
        self,
        batch: int,
        device: torch.device,
        generator: torch.Generator | None,
        seed: int | Sequence[int] | None,
    ) -> None:
        if generator is not None and seed is not None:
            raise ValueError("give generator or seed, not both")
        self.generator, self.count = generator, 0
        self.rng: Tensor | None = None
        if generator is not None:
            return
        if seed is None:  # take one from torch.manual_seed's generator
            seed = int(torch.randint(2**62, (1,)).item())
        try:
            if isinstance(seed, Sequence):
                seeds = [operator.index(s) % 2**63 for s in seed]
            else:
                one = operator.index(seed)
                # Seeds are distinct, and a video's noise does not depend on the batch size.
                seeds = [(one + i * 0x9E3779B97F4A7C15) % 2**63 for i in range(batch)]
        except TypeError:
            raise TypeError(f"seed must be one int or {batch} of them, got {seed!r}") from None
        if len(seeds) != batch:
            raise ValueError(f"seed must be one int or {batch} of them, got {len(seeds)}")
        self.rng = torch.tensor(seeds, dtype=torch.int64).to(device)

    def draw(self, like: Tensor) -> dict[str, Any]:
        """The arguments of ``guidance_update`` for the next draw."""
        self.count += 1
        if self.rng is not None:
            return {"rng": self.rng, "step": self.count - 1}
        noise = torch.randn(
            like.shape, dtype=like.dtype, device=like.device, generator=self.generator
        )
        return {"noise": noise}


class Run:
    """One sampling run: the state z, and how a row of the plan advances it."""

    def __init__(
        self,
        denoiser: Denoiser,
        given: Given | None,
        noise: Noise,
        clip: str | None,
        percentile: float,
        want_x: bool,
    ) -> None:
        self.denoiser, self.given, self.noise = denoiser, given, noise
        self.clip, self.percentile, self.want_x = clip, percentile, want_x

    def start(
        self, plan: Plan, shape: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """z_1 ~ N(0, I); known frames are drawn from their own marginal."""
        z = torch.zeros(tuple(shape), device=device, dtype=dtype)
        return self._update(z, z, plan.start, **self.noise.draw(z), want_x=False)[1]

    def _update(
        self, z: Tensor, estimate: Tensor, coef: Tensor, want_x: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """``guidance_update``; known values of z and x are kept."""
        given = self.given
        options["want_x"] = want_x
        if given is not None and given.mask is None:
            options |= given.frames()
        x, z_next = guidance_update(z, estimate, coef, **options)
        if given is None or given.mask is None or given.known is None:
            return x, z_next
        # A mask: run the kernel again with all frames known and the same noise, then select.
        noise = {k: options[k] for k in ("noise", "rng", "step") if k in options}
        held = guidance_update(
            z, z, coef, known=given.known, slot=given.slot, want_x=False, **noise
        )[1]
        x = torch.where(given.mask, given.known, x) if want_x else x
        return x, torch.where(given.mask, held, z_next)

    def advance(
        self, z: Tensor, row: Row, noise: Noise | DeviceNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_tilde, z_next): one network call, with its backward pass if the row is guided.

        The result depends on the tensors only, apart from the position in the stream of ``Noise``.
        """
        options: dict[str, Any] = {}
        if row.guided:
            assert self.given is not None
            estimate, options = self._guide(z, row)
            coef = row.after
        else:
            with torch.no_grad():
                estimate = self.denoiser(z, row.time)
            coef = row.direct
        if self.clip == "dynamic":
            options["threshold"] = self._threshold(z, estimate, coef, options)
        if row.noisy:
            options |= (noise or self.noise).draw(z)
        return self._update(z, estimate, coef, self.want_x, clip=self.clip is not None, **options)

    def _guide(self, z: Tensor, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        """x_hat, and the gradient that Eqs. 7 and 8 subtract from it."""
        given = self.given
        assert given is not None
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            out = self.denoiser(leaf, row.time)
        if not out.requires_grad:
            raise RuntimeError(
                "the model's output does not depend on its input through autograd (does it detach, "
                "or run under inference_mode?): reconstruction guidance needs its gradient"
            )
        detached = out.detach()
        extra = given.extra_gradient(z, detached, row.guide) if given.autograd_low_res else None
        half = torch.float16 in (out.dtype, self.denoiser.compute_dtype(z.device.type))
        x_hat, cotangent = guidance_seed(
            z,
            detached.to(z.dtype) if half else detached,
            row.guide,
            **given.targets(),
            extra=extra,
            clip=given.clip_before_loss,
        )
        if given.mask is not None:
            cotangent = given.seed_of_pixels(z, detached, x_hat, row.guide, cotangent)
        gradient = _scaled_gradient if half else _gradient
        options = {"grad": gradient(out, leaf, cotangent)}
        if given.has_low_res:  # D(x_hat) also depends on z directly; x_hat^a not on z^b
            options["seed"] = cotangent
        return x_hat, options

    def _threshold(
        self, z: Tensor, estimate: Tensor, coef: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Dynamic thresholding: the larger of 1 and a quantile of |x_tilde|, per sample.

        A quantile is not elementwise, so this mode costs launches of its own. torch.quantile
        refuses 2^24 elements and reads a tensor on the host, so its formula is repeated here.
        """
        x, _ = self._update(z, estimate, coef, **options)
        ordered = x.abs().flatten(1).sort(dim=1).values
        place = self.percentile * (ordered.shape[1] - 1)
        low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        return torch.lerp(low, high, place - math.floor(place)).clamp_min(1.0)


def _gradient(out: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(out, leaf, cotangent)
    return grad


def _scaled_gradient(out: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    """``_gradient`` in fp16. At high noise the cotangent exceeds the largest fp16 number, so it is
    scaled by a power of two per sample, to a maximum near 1."""
    tiny = torch.finfo(cotangent.dtype).tiny
    most = cotangent.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(tiny)
    scale = torch.exp2(most.log2().round())
    return _gradient(out, leaf, (cotangent / scale).to(out.dtype)) * scale
