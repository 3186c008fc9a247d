"""The losses of stage 1, as per-sample terms and a denominator of the global batch, whatever the number of ranks."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import BackboneConfig
from pipeline.longtail import class_balanced_weights, inverse_prior_weights, ldam_margins, log_prior

UNREADABLE = -100  # label of a black image that stands for one that cannot be read
SCALE = 30.0  # s of the cosine classifier of ldam-drw


class TrainingLoss:
    """The loss Σ_i terms_i / denominator over the global batch of B samples.

    z (B, C) logits, y (B,) labels, p = softmax(z), N_c training images of class c, π_c = N_c/N; CE(z, y) = −ln p_y, with
    label_smoothing ε (of every loss but focal) −(1 − ε)·ln p_y − ε/C·Σ_c ln p_c [Szegedy et al., CVPR 2016, §7].

    ce: CE(z, y); B.
    focal: (1 − p_y)^γ·(−ln p_y), γ = focal_gamma; B. [Lin et al., ICCV 2017, Eq. 4]
    cb: v_y·CE(z, y), v_c = (1 − β)/(1 − β^N_c), β = cb_beta; Σ_i v_y. [Cui et al., CVPR 2019, softmax form]
    grw: v_y·CE(z, y), v_c = π_c^(−ρ), ρ = grw_rho; Σ_i v_y. [generalised re-weighting; Zhang et al., CVPR 2021]
    balanced-softmax: CE(z + ln π, y), while z alone decides at test; B. [Ren et al., NeurIPS 2020, Theorem 1]
    ldam-drw: v_y·CE(z − s·m_y·onehot(y), y), z = s·cos(W_c, x), s = 30, m_c = ldam_margin·(N_min/N_c)^(1/4); Σ_i v_y.
        v = 1, and that of cb once the share drw_start of the epochs is over. [Cao et al., NeurIPS 2019, Algorithm 1]

    Weighted losses are divided by the sum of the weights in the batch, as `cb: softmax` of stage 2, the released code of
    LDAM-DRW and torch's `weight=` do: the step does not grow with how many rare images a batch happens to hold.
    """

    def __init__(self, settings: BackboneConfig, counts: np.ndarray, *, device: torch.device):
        self.settings = settings
        sizes = torch.as_tensor(counts, dtype=torch.float64)
        self._log_prior = log_prior(sizes).to(device)
        self._margins = ldam_margins(sizes, settings.ldam_margin).to(device)
        self._weights: Tensor | None = None
        if settings.loss in ("cb", "ldam-drw"):
            self._weights = class_balanced_weights(sizes, beta=settings.cb_beta).to(device)
        elif settings.loss == "grw":
            self._weights = inverse_prior_weights(sizes, settings.grw_rho).to(device)
        # beside those on the device: a step that reads them from there waits for the one before
        self._host_weights = None if self._weights is None else self._weights.cpu().numpy()

    @property
    def scale(self) -> float | None:
        """Return s where logits are s·cos(W_c, x), None where they are W·x + b."""
        return SCALE if self.settings.loss == "ldam-drw" else None

    def terms(self, logits: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Return the terms (B,) of logits (B, C) and labels (B,); 0 where the label is UNREADABLE."""
        settings, classes = self.settings, labels.clamp_min(0)
        if settings.loss == "balanced-softmax":
            logits = logits + self._log_prior.to(logits)
        elif settings.loss == "ldam-drw":
            margins = SCALE * self._margins.to(logits)[classes]
            logits = logits - margins[:, None] * F.one_hot(classes, logits.shape[1])
        terms = F.cross_entropy(
            logits, labels, reduction="none", ignore_index=UNREADABLE, label_smoothing=settings.label_smoothing
        )
        if settings.loss == "focal":
            # 1 − p_y, kept from 0, where a power below 1 has no gradient
            doubt = (-torch.expm1(-terms)).clamp_min(torch.finfo(terms.dtype).eps)
            terms = doubt**settings.focal_gamma * terms
        weights = self._weights_in(epoch)
        return terms if weights is None else weights.to(terms)[classes] * terms

    def denominator(self, labels: np.ndarray, *, epoch: int) -> float:
        """Return the divisor of the sum over a global batch of these labels (B,)."""
        if self._weights_in(epoch) is None or self._host_weights is None:
            return float(len(labels))
        return float(self._host_weights[labels].sum())

    def _weights_in(self, epoch: int) -> Tensor | None:
        """Return the class weights (C,), None where all classes weigh the same."""
        settings = self.settings
        if settings.loss == "ldam-drw" and epoch < round(settings.drw_start * settings.epochs):
            return None
        return self._weights
