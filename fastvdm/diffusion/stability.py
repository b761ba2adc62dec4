"""How large a guidance weight may be before a step amplifies its own error.

In all samplers here a step is z_s/alpha_s = (1 - c) z_t/alpha_t + c x_tilde + noise with
c = u_x/alpha_s in (0, 1]. c is 1 at the last step, 1 - e^(lt - ls) in other steps of the ancestral
sampler, and delta/2 in the corrector.
Let x_hat = K z with P = alpha K symmetric and 0 <= P <= 1. The perfect denoiser of a Gaussian has
this form; its null space is what data never are. With the weights w of Eq. 7 and w_y = y/|D|^2 of
Eq. 8 a step multiplies an error in the drawn frames by

    1 - c (1 - P_bb + w P_ba P_ab + w_y (P D^T D P)_bb)

A mode with the share p of its energy in the drawn frames has P_bb = p, P_ba P_ab = p (1 - p), and
at most y p from the low resolution. The bracket is then 1 + p (w (1 - p) + y - 1), which is at most
max(1, y, 1 + (w + y - 1)^2/(4 w)) over all p. Errors do not grow while c times the bracket is below
2; at the bound KAPPA = 1.5 the factor stays above -1/2. The bound holds for any such P and any
split of the frames. For w alone it is (w + 1)^2/(4 w) <= KAPPA/c, i.e. w <= 3.7 at the last step
and w <= 118 for a corrector of 0.1. More steps (a smaller c) raise it in the middle of a run but
never at its ends.

The bound does not cover two cases. Between the modes of a mixture P exceeds 1 for a while: without
clipping and with few known frames, single values then land far outside. With classifier-free
guidance of scale s, P is s times one such map minus s - 1 times another and can be as low as 1 - s.
No weight makes that stable, not even 0. Clipping does, and for ordinary classes the bound does no
harm.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

N = TypeVar("N", float, Tensor)

KAPPA = 1.5

# The factor of F/n in guidance_weight="auto". F/n is exact for still videos, and closest to the
# true distribution of slowly changing Gaussian videos. A larger factor preserves more of a clip
# over many windows, but carries known frames too far where little persists. 2 lies between 1 and
# the paper's weights: 50 for 1 known frame of 16 (3.1 F/n), 9 for 5 of 16.
AUTO = 2.0


def auto_weight(num_frames: N, num_known: N) -> N:
    """w_r for guidance_weight="auto" before it is limited: 2 F/n for n known frames of F. With a
    mask n/F is the fraction of known values."""
    return AUTO * num_frames / num_known


def still_weights(
    contraction: Tensor, num_frames: float | Tensor, num_known: float | Tensor
) -> Tensor:
    """The w_r that removes, in one step, the error in what all frames share; a larger one reverses
    its sign. It is F/(F - n) (F/(c n) - 1), which is F/n at the last step. The shape is that of
    ``contraction``, (N,) or (N, 1), broadcast with the numbers of each sample."""
    f, n = num_frames, num_known
    return f / (f - n) * (f / (contraction * n) - 1)


def stable_weights(contraction: Tensor, known: Tensor, low_res: Tensor) -> tuple[Tensor, Tensor]:
    """Lower the weights of each step to the stable range.

    Args:
        contraction: (N,) or (N, 1) c = u_x/alpha_s of every step, fp64, positive.
        known: (N,) or (N, B) w_r; 0 without known frames.
        low_res: (N,) or (N, B) y, the weight of the low resolution in units of 1/|D|^2; 0 without
            one. It is lowered first, to KAPPA/c; w_r is then lowered to what remains.

    Returns:
        w_r and y.
    """
    room = KAPPA / contraction  # bound on the bracket
    low = torch.minimum(low_res, room.clamp_min(1.0))
    a, e = (room - 1).clamp_min(0), low - 1
    # Solves (w + e)^2 <= 4 w a. If w <= e, y alone determines the bound.
    most = (2 * a - e) + 2 * (a * (a - e)).clamp_min(0).sqrt()
    return torch.minimum(known, most.clamp_min(0)), low
