"""The coefficients of a sampling run: what each network call and its update need, per sample.

They are computed in fp64 on the CPU and sent to the device once, so that no step waits for the
host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvdm.diffusion.given import Given
from fastvdm.diffusion.prediction import Prediction, x_coefficients
from fastvdm.diffusion.samplers import Langevin, Sampler, Update, marginal, posterior
from fastvdm.diffusion.schedule import Schedule, alpha_of
from fastvdm.diffusion.stability import auto_weight, stable_weights, still_weights


class Row(NamedTuple):
    """What one network call and its update need per sample, on the device."""

    time: Tensor  # (B,)
    guide: Tensor  # (B, 4) for guidance_seed
    after: Tensor  # (B, 9) for guidance_update with estimate = x_hat
    direct: Tensor  # (B, 9) for guidance_update with estimate = the network's output
    noisy: bool  # whether the update draws noise
    guided: bool


class Plan:
    """All rows of a run, in the order of its steps."""

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        sampler: Sampler,
        corrector: Langevin | None,
        num_steps: int | None,
        time_input: str,
        given: Given | None,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        levels = schedule.levels(num_steps)
        self.log_snr = levels.log_snr.tolist()
        self.num_steps = n = len(self.log_snr) - 1
        guided = given is not None and given.guided
        lt, ls = levels.log_snr[:-1], levels.log_snr[1:].clone()
        ls[-1] = torch.inf  # the final step returns x_hat itself
        steps = Update(*sampler.update(lt, ls))
        replace = posterior(lt, ls) if given and given.replacement == "posterior" else marginal(ls)
        # The last update returns x_hat exactly, without the rounding of the rule.
        for rule in (steps, replace):
            for column, value in zip(rule, (0.0, 1.0, 0.0)):
                column[-1] = value
        time = levels.network_time(time_input)
        self._send = (batch, device, dtype)
        self._replaces = given is not None and given.known is not None
        self.notes: list[str] = []  # warnings for the caller
        weights = _weights(given, steps.u_x / alpha_of(ls), self.notes)
        self.steps = self._rows(lt, time, prediction, steps, replace, weights, guided)
        self.corrections: list[Row] = []
        if corrector is not None:
            still = Update(torch.ones(n), torch.zeros(n), torch.zeros(n))  # z^a does not change
            fix = corrector.update(lt)
            on = guided and corrector.guided
            weights = _weights(given, fix.u_x / alpha_of(lt), [])
            self.corrections = self._rows(lt, time, prediction, fix, still, weights, on)
        first = marginal(lt[:1])
        zero = torch.zeros(1)
        start = [zero, zero, zero, zero, zero, zero + 1, zero, first.u_x, first.u_n]
        self.start = self._table(start)[0]

    def _table(self, columns: list[Tensor]) -> Tensor:
        """(N, B, n) from n columns, each (N,), or (N, B) if it differs between samples."""
        batch, device, dtype = self._send
        wide = [c.double().view(len(c), -1).expand(-1, batch) for c in columns]
        return torch.stack(wide, dim=2).to(dtype).contiguous().to(device)

    def _rows(
        self,
        log_snr: Tensor,
        time: Tensor,
        prediction: Prediction,
        step: Update,
        replace: Update,
        weights: tuple[Tensor, Tensor],
        guided: bool,
    ) -> list[Row]:
        batch, device, dtype = self._send
        p_z, p_m = x_coefficients(log_snr, prediction)
        zero, one = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        tail = [p_z / p_m, *step, *replace]
        half = 0.5 * alpha_of(log_snr) * p_m
        guide = self._table([p_z, p_m, weights[0] * half[:, None], weights[1] * half[:, None]])
        after, direct = self._table([zero, one, *tail]), self._table([p_z, p_m, *tail])
        time = time.to(dtype) if time.is_floating_point() else time
        times = time[:, None].expand(-1, batch).contiguous().to(device)
        noisy = ((step.u_n != 0) | (self._replaces & (replace.u_n != 0))).tolist()
        return [
            Row(times[i], guide[i], after[i], direct[i], noisy[i], guided)
            for i in range(len(log_snr))
        ]


def _weights(given: Given | None, contraction: Tensor, notes: list[str]) -> tuple[Tensor, Tensor]:
    """The factors (N, 1 or B) of the two squared errors, lowered to the stable range.

    A sentence on each lowered number is appended to ``notes``.
    """
    c = contraction.abs().clamp_min(1e-12)[:, None]
    if given is None or not given.guided:
        return torch.zeros_like(c), torch.zeros_like(c)
    f, n = given.count, given.num_known
    some = (n > 0) & (n < f)  # in the other samples all values are known, or none
    n = torch.where(some, n, f / 2)
    auto = auto_weight(f, n) if given.weight == "auto" else torch.full_like(n, float(given.weight))
    known = auto * torch.ones_like(c)
    low = torch.full_like(c, 1.0 if given.low_weight == "auto" else float(given.low_weight))
    if given.limited:
        if given.weight == "auto":
            known = torch.minimum(known, still_weights(c, f, n))
        if given.low_weight == "auto":
            low = 1 / c
        asked = ("guidance_weight", given.weight, known), ("low_res_weight", given.low_weight, low)
        known, low = stable_weights(c, known, low)
        for (name, number, before), after in zip(asked, (known, low)):
            lowered = int((after < before).any(1).sum())
            if lowered and number != "auto":
                notes.append(
                    f"{name}={number:g} is beyond the limit of {lowered} of {len(c)} steps and "
                    f"lowered there, to {float(after.min()):.3g} at the least; "
                    "guidance_limit='none' takes it as it is"
                )
    return torch.where(some, known, 0), low / given.norm_squared.double()
