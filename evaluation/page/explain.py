"""What a metric means, in one sentence for readers of the page."""

from __future__ import annotations

from beeline.features.measuring import DINOV2, LOSSES_PROBE, MEASURING_PROBE
from beeline.metrics.measures import FID, FRECHET, INCEPTION_SCORE, KID, PAIR_RMS, frechet_name, is_diversity

DISTANCE = "Fréchet distance between generated and real images in the features of"
PROBE = "a probe, a small classifier trained on this data"
OF_A_PROBE = "It is not FID and does not compare with the distance in another probe"
TEXTS = {
    FID: f"{DISTANCE} Inception v3 (FID)",
    frechet_name(MEASURING_PROBE): f"{DISTANCE} {PROBE}, which no loss uses. {OF_A_PROBE}",
    frechet_name(LOSSES_PROBE): f"{DISTANCE} {PROBE}, which losses may use. {OF_A_PROBE}",
    **{frechet_name(network): f"{DISTANCE} DINOv2, which no loss uses. It is not FID" for network in DINOV2},
    FRECHET: f"{DISTANCE} the network in its name. It is not FID",
    KID: "kernel distance in Inception's features",
    INCEPTION_SCORE: "Inception Score",
    "precision": "share of samples that lie among the real images (k = 3 nearest neighbours)",
    "recall": "share of real images that lie among the samples (k = 3). It falls when diversity is lost",
    "density": "how densely real images lie around the samples (k = 5). It can exceed 1",
    "coverage": "share of real images with a sample in their neighbourhood (k = 5)",
    "authenticity": "share of samples that are farther from their nearest real image than that image is from its own nearest. "
    "It is low when training images are copied",
    PAIR_RMS: "root mean square distance to the teacher's image of the same noise, for images in [-1, 1], on held-out pairs",
}
NETWORKS = {
    MEASURING_PROBE: "the measuring probe", LOSSES_PROBE: "the losses' probe", **dict.fromkeys(DINOV2, "DINOv2"),
}  # fmt: skip


def explain(metric: str) -> str:
    """The text of the longest known name that the metric starts with; "" for an unknown metric."""
    known = [name for name in TEXTS if metric == name or metric.startswith(f"{name}_")]
    if not known:
        return ""
    name = max(known, key=len)
    rest = metric.removeprefix(name).strip("_")  # "<network>_<count>", "<network>", "<count>" or ""
    if not is_diversity(name) or "_" not in rest:
        return TEXTS[name]
    network = rest.rpartition("_")[0]
    return f"in the features of {NETWORKS.get(network, network)}: {TEXTS[name]}"
