"""The cases of :mod:`benchmarks.field`: each tool at each share of the MACs, from each seed."""

from __future__ import annotations

from benchmarks.cases import AIMET, COMPRESS_SEARCH, TORCH_PRUNING, Case, Step

SPLITS = {0.7: (0.85, 0.82), 0.5: (0.75, 0.66), 0.33: (0.6, 0.55)}
"""For each share of the MACs, what is asked of spatial SVD, and then of channel pruning."""

AIMET_SETTINGS = {"monotonic_fit": True, "reconstruction_samples": 5_000}
"""The better ones that an hour's patience allows; see :mod:`benchmarks.ratio_selection`."""

OUR_SETTINGS = {"selection": "optimal", "samples": 2_048, "scoring_samples": 512}
"""Fewer images than AIMET looks at."""

TORCH_PRUNING_SETTINGS = {"importance": "magnitude", "batchnorm": True}
"""As in its benchmarks; but without new statistics of BatchNorm nothing is left of the accuracy."""


PLANS = ("both", "spatial_svd")
"""What AIMET and ours may do: spatial SVD and then channel pruning, or all of it by spatial SVD."""


def cases_of(network: str, ratio: float, seed: int, *, plan: str = "both") -> tuple[Case, ...]:
    """AIMET, and then the others, who may spend as many MACs as AIMET's network has.

    Args:
        network: Name of the network.
        ratio: A key of :data:`SPLITS`.
        seed: Of what is random in a tool. Ours takes other images from another seed.
        plan: One of :data:`PLANS`.
    """
    svd, pruning = SPLITS[ratio]
    both = (Step("spatial_svd", svd), Step("channel_pruning", pruning))
    steps = both if plan == "both" else (Step("spatial_svd", ratio),)
    name = f"field-{ratio}" if plan == "both" else f"field-{ratio}-{plan}"
    aimet = f"{name}-{AIMET}-seed{seed}"
    others = (
        (COMPRESS_SEARCH, steps, OUR_SETTINGS),
        (TORCH_PRUNING, (Step("channel_pruning", ratio),), TORCH_PRUNING_SETTINGS),
    )
    return (
        Case(aimet, AIMET, network, steps, AIMET_SETTINGS, seed=seed),
        *(
            Case(f"{name}-{tool}-seed{seed}", tool, network, steps, settings, rival=aimet, seed=seed)
            for tool, steps, settings in others
        ),
    )
