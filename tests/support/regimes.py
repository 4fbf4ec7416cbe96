"""Features whose losses are small differences of large sums: functions of the features that a case draws."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def floating(features, function):
    """Return the features with the function applied to all but the labels."""
    return {name: function(x) if x.is_floating_point() else x for name, x in features.items()}


def long_rows(ratio):
    """Return every eighth row `ratio` times as long as the others."""

    def regime(features):
        def scaled(x):
            factors = torch.where(torch.arange(len(x)) % 8 == 0, ratio, 1.0)
            return x * factors.double().reshape(-1, *(1,) * (x.dim() - 1))

        return floating(features, scaled)

    return regime


def wide_columns(ratio):
    """Return two columns `ratio` times as wide as the others."""

    def regime(features):
        return floating(features, lambda x: torch.cat([ratio * x[..., :2], x[..., 2:]], -1))

    return regime


def far(features):
    """Return rows at a distance of 1000 from the origin."""
    return floating(features, lambda x: x + 1e3)


def close_rows(distance):
    """Return rows at about this distance from each other."""

    def regime(features):
        first = next(iter(features.values()))
        center = F.normalize(first.reshape(-1, first.shape[-1])[0], dim=-1)
        return floating(features, lambda x: center + distance * x / math.sqrt(2 * x.shape[-1]))

    return regime


def close_views(distance):
    """Return samples whose rows are at about this distance from each other."""

    def regime(features):
        first = F.normalize(next(iter(features.values())), dim=-1)
        anchors = first if first.dim() == 2 else first[:, 0]

        def near(x):
            index = torch.arange(len(x)) % len(anchors)
            return anchors[index].reshape(len(x), *(1,) * (x.dim() - 2), -1) + distance * x / math.sqrt(2 * x.shape[-1])

        return floating(features, near)

    return regime


# For float32: half precision has no digits there.
CANCELLING = {
    **{f"rows-{ratio:g}": long_rows(ratio) for ratio in (1e2, 1e4)},
    **{f"columns-{ratio:g}": wide_columns(ratio) for ratio in (1e2, 1e4)},
    "far": far,
    **{f"close_rows-{distance:g}": close_rows(distance) for distance in (1e-3, 1e-4)},
    **{f"close_views-{distance:g}": close_views(distance) for distance in (1e-3, 1e-4)},
}
# All similarities are the same but for a few roundings.
COINCIDING = ("far", "close_rows-0.001", "close_rows-0.0001")
