"""What a metric is, in a sentence for those who read a report."""

from __future__ import annotations

from evaluation.models import DIVERSITY

FRECHET = "Fréchet distance between generated and real images in the features of"
TEXTS = {
    "fid": f"{FRECHET} Inception v3 (FID)",
    "fd_probe": f"{FRECHET} a probe trained on this data, which no loss has used. It is not FID, and does not compare with "
    "another probe's",
    "fd_dinov2": f"{FRECHET} DINOv2, which no loss has used. It is not FID",
    "fd": f"{FRECHET} the network in its name. It is not FID",
    "kid": "kernel distance in Inception's features",
    "is": "Inception Score",
    "precision": "share of samples that lie within the real images (k = 3 nearest neighbours)",
    "recall": "share of real images that lie within the samples (k = 3): falls where diversity is lost",
    "density": "how densely real images lie around samples (k = 5); can pass 1",
    "coverage": "share of real images with a sample in their neighbourhood (k = 5)",
    "authenticity": "share of samples farther from their nearest real image than that one from its own nearest: low where "
    "training images are copied",
    "pair_rms": "root mean square distance to the teacher's image of the same noise, in images of [-1, 1], on held-out pairs",
}

NETWORKS = {"probe": "the measuring probe", "dinov2": "DINOv2"}


def explain(metric: str) -> str:
    """Of the longest name that begins the metric's; "" for one that is not known."""
    known = [name for name in TEXTS if metric == name or metric.startswith((f"{name}_", f"{name}v"))]
    known += ["fd_dinov2"] * metric.startswith("fd_dinov2")
    text = TEXTS[max(known, key=len)] if known else ""
    where = metric.split("_")[1] if metric.split("_")[0] in DIVERSITY and metric.count("_") > 1 else ""
    return f"{text}, in the features of {NETWORKS.get(where, where)}" if where else text
