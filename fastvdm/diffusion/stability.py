"""How large a guidance weight may be before a step amplifies its own error.

A step of any rule here is z_s/alpha_s = (1 - c) z_t/alpha_t + c x_tilde + noise with
c = u_x/alpha_s in (0, 1]: 1 at the last step, 1 - e^(lt - ls) before in the ancestral sampler,
delta/2 for the corrector.
Let x_hat = K z with P = alpha K symmetric, 0 <= P <= 1 (the perfect denoiser of a Gaussian; its
null space is what data never are). With the weights w of Eq. 7 and w_y = y/|D|^2 of Eq. 8 a step
multiplies an error in the drawn frames by

    1 - c (1 - P_bb + w P_ba P_ab + w_y (P D^T D P)_bb)

A mode that has the share p of its energy in the drawn frames has P_bb = p, P_ba P_ab =
p (1 - p), and at most y p from the low resolution: the bracket is 1 + p (w (1 - p) + y - 1), at
most max(1, y, 1 + (w + y - 1)^2/(4 w)) over all p. Nothing grows where c times that is below 2, and
at KAPPA = 1.5 the factor is above -1/2. The bound holds for any such P and any split of the frames:
for w alone it is (w + 1)^2/(4 w) <= KAPPA/c, which is 3.7 at the last step and 118 for a corrector
of 0.1. More steps (a smaller c) raise it in the middle of a run, never at its ends.

Two things are outside of it. Between the modes of a mixture P passes 1 for a while: where nothing
is clipped and few frames are known, single values land far outside. And with classifier-free
guidance of scale s P is s times one such map less s - 1 times another, as low as 1 - s, which no
weight makes stable, not even 0; clipping does, and for ordinary classes the bound does no harm.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

N = TypeVar("N", float, Tensor)

KAPPA = 1.5

# F/n is exact for still videos, and nearest to the true law of Gaussian ones that change slowly.
# More keeps more of a clip over many windows, and carries what is known too far where little
# persists: this is between F/n and the paper's 50 (1 of 16 frames known, 3.1 F/n) and 9 (5 of 16).
AUTO = 2.0


def auto_weight(num_frames: N, num_known: N) -> N:
    """w_r of guidance_weight="auto" before its limit: 2 F/n, n of F frames known; of a mask n/F is
    the known share of the values."""
    return AUTO * num_frames / num_known


def still_weights(
    contraction: Tensor, num_frames: float | Tensor, num_known: float | Tensor
) -> Tensor:
    """The w_r that end an error in what all frames share at once, and beyond which it would come
    back with the other sign: F/(F - n) (F/(c n) - 1), which is F/n at the last step. In the shape
    that ``contraction`` (N,) or (N, 1) and the numbers of each sample have together."""
    f, n = num_frames, num_known
    return f / (f - n) * (f / (contraction * n) - 1)


def stable_weights(contraction: Tensor, known: Tensor, low_res: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of every step, lowered to the stable range where they are beyond it.

    Args:
        contraction: (N,) or (N, 1) c = u_x/alpha_s of every step, fp64, positive.
        known: (N,) or (N, B) w_r; 0 without known frames.
        low_res: of either shape, y, the weight of the low resolution in units of 1/|D|^2; 0 without
            one. It is lowered first, to KAPPA/c, and w_r to what that leaves.

    Returns:
        w_r and y.
    """
    room = KAPPA / contraction  # of the bracket
    low = torch.minimum(low_res, room.clamp_min(1.0))
    a, e = (room - 1).clamp_min(0), low - 1
    # (w + e)^2 <= 4 w a; any w <= e is within the bound of y alone
    most = (2 * a - e) + 2 * (a * (a - e)).clamp_min(0).sqrt()
    return torch.minimum(known, most.clamp_min(0)), low
