"""Every method of stage 2 with what it does in a line; imports nothing, so that `--help` is quick."""

METHODS = {
    "baseline": "the stage-1 head as it is",
    "ce": "retrain with cross-entropy",
    "cb": "retrain with the class-balanced loss",
    "iwb": "inverse weight-balancing",
    "focal": "retrain with the focal loss",
    "grw": "retrain with weights π^−ρ",
    "crt": "a new classifier, class-balanced sampling",
    "lws": "a learned scale for each class vector",
    "balanced-softmax": "retrain with the prior inside the softmax",
    "ldam-drw": "cosine classifier with margins, deferred re-weighting",
    "maxnorm": "class-balanced loss, weight decay, norms held under a threshold",
    "marc": "a learned margin for each class",
    "disalign": "logits aligned by a learned gate",
    "iif-trained": "retrain with logits times inverse image frequency",
    "ala": "cosine classifier with adaptive logit adjustment",
    "las": "label-aware smoothing and a learned scale",
    "tau-norm": "class vectors divided by |w|^τ; no training",
    "ncm": "nearest class mean; no training",
    "logit-adjust": "logits less τ·ln π; no training",
    "iif": "logits times inverse image frequency; no training",
}
