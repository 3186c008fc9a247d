"""Every method of stage 2 with what it does in a line; imports nothing heavy, so that `--help` is quick."""

from collections.abc import Mapping, Sequence
from typing import Any

PROBE = "linear probe"

METHODS = {
    "baseline": "the head it starts from, of stage 1 or a linear probe",
    "ce": "retrain with cross-entropy",
    "cb": "retrain with the class-balanced loss",
    "iwb": "inverse weight-balancing",
    "iwb-la": "iwb with the logit-adjusted loss, class means mixed in",
    "focal": "retrain with the focal loss",
    "grw": "retrain with weights π^−ρ",
    "crt": "a new classifier, class-balanced sampling",
    "lws": "a learned scale for each class vector",
    "balanced-softmax": "retrain with the prior inside the softmax",
    "ldam-drw": "cosine classifier with margins, deferred re-weighting",
    "maxnorm": "class-balanced loss, weight decay, bounded norms",
    "marc": "a learned margin for each class",
    "disalign": "logits aligned by a learned gate",
    "iif-trained": "retrain with logits times inverse image frequency",
    "ala": "cosine classifier with adaptive logit adjustment",
    "las": "label-aware smoothing and a learned scale",
    "tau-norm": "class vectors divided by |w|^τ; no training",
    "ncm": "nearest class mean; no training",
    "logit-adjust": "logits less τ·ln π; no training",
    "iif": "logits times inverse image frequency; no training",
    "logistic": "logistic regression, class weights N^−ρ; convex",
    "logistic-adjusted": "plain logistic regression less τ·ln π; convex",
    "gda": "Gaussian discriminant, shrunk covariance; no training",
    "adjust-means": "logits less τ·ln π plus class means; no training",
    "logistic-balanced": "logistic regression, class weights 1/N; convex",
    "ensemble": "a weighted mean of linear heads, one linear layer",
}
# what is fitted where neither a method nor λ is given; the ensemble averages its members among them
RECOMMENDED = (
    "logit-adjust",
    "adjust-means",
    "gda",
    "logistic",
    "logistic-balanced",
    "logistic-adjusted",
    "cb",
    "iwb",
    "ensemble",
)
MEMBERS = ("adjust-means", "gda", "logistic", "logistic-adjusted", "cb", "iwb")

RENAMED = {"best": "iwb-la"}  # of format 0.1


def start_name(fingerprint: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the name of the head that stage 2 starts from: `stage 1`, or `linear probe` where a backbone brought none.

    fingerprint: of the store, or of the stores of several backbones.
    """
    first = fingerprint if isinstance(fingerprint, Mapping) else next(iter(fingerprint or ()), {})
    return PROBE if "probe" in first else "stage 1"
