"""Quality over bytes: resampling, hulls and ratios. No model, clock or file.

The intervals are percentiles of a paired bootstrap over photos (Efron & Tibshirani, 1993, chapters 6 and 13): each draw
takes the same photos for all points, so the noise that the points share is not in their ratios.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
SEED = 0
CHUNK = 500  # draws whose counts are in memory
BARE = "avif-bare"  # AVIF without its container and without an envelope
CURVES = ("jpeg", "webp", "avif", BARE)

Floats = NDArray[np.float64]


class Point(NamedTuple):
    """One way of sending a photo."""

    name: str
    kind: str  # level, prefix, groups, budget, or a picture codec


def figures(
    points: Sequence[Point], default: int, payload: Floats, content: Floats, scores: Mapping[str, Floats]
) -> dict[str, Any]:
    """The figures of all points, as JSON has them. A list of three is a value and its 95 % interval.

    default: the row of the default level. payload, content: bytes [points, photos], of the whole payload and of the
    features or picture data in it. scores: each measure's, [points, photos].
    """
    rows = {kind: [row for row, point in enumerate(points) if point.kind == kind] for _, kind in points}
    top = rows["level"][-1]
    ours = [row for row, point in enumerate(points) if point.kind not in CURVES]
    sizes = Sample.of(payload)
    found: list[dict[str, Any]] = [
        point._asdict() | {"bytes": sizes.figure(row), "content_bytes": _short(content[row].mean())}
        for row, point in enumerate(points)
    ]
    curves = {name: (sizes, rows[name]) for name in CURVES if name in rows}
    if "avif" in rows:
        curves[BARE] = Sample.of(content), rows["avif"]
    orders = [rows["level"], [*rows.get("prefix", ()), default], [*rows.get("groups", ()), default]]
    steps = [step for order in orders for step in pairwise(order)]
    changes: list[dict[str, Any]] = [{"from": points[a].name, "to": points[b].name} for a, b in steps]
    hulls: dict[str, dict[str, list[str]]] = {}
    for measure, values in scores.items():
        quality = Sample.of(values)
        for row, figure in enumerate(found):
            figure |= {measure: quality.figure(row), f"{measure}_to_top": quality.ratio(row, top)}
        for row, ratios in zip(ours, codec_ratios(sizes, quality, ours, curves), strict=True):
            found[row][f"{measure}_codec_bytes"] = ratios
        for change, (a, b) in zip(changes, steps, strict=True):
            change[measure] = triple(quality.value[b] - quality.value[a], quality.draws[:, b] - quality.draws[:, a])
        hulls[measure] = {
            name: [points[on[at]].name for at in hull(sample.value[on], quality.value[on])]
            for name, (sample, on) in curves.items()
        }
    return {
        "photos": payload.shape[1],
        "top": points[top].name,
        "default": points[default].name,
        "points": found,
        "steps": changes,
        "hulls": hulls,
    }


class Sample(NamedTuple):
    """Means over photos."""

    value: Floats  # [points], over the photos themselves
    draws: Floats  # [DRAWS, points], over photos drawn with replacement

    @classmethod
    def of(cls, values: Floats) -> "Sample":
        """values: [points, photos]."""
        return cls(values.mean(1), bootstrap(values))

    def figure(self, row: int) -> list[float | None]:
        return triple(self.value[row], self.draws[:, row])

    def ratio(self, row: int, other: int) -> list[float | None]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return triple(self.value[row] / self.value[other], self.draws[:, row] / self.draws[:, other])


def bootstrap(values: Floats) -> Floats:
    """values [points, photos] to their means in each draw, [DRAWS, points]; the same photos in every call."""
    photos, random = values.shape[1], np.random.default_rng(SEED)
    shares = np.full(photos, 1 / photos)
    counts = (random.multinomial(photos, shares, min(CHUNK, DRAWS - at)) for at in range(0, DRAWS, CHUNK))
    return np.concatenate([chunk @ values.T / photos for chunk in counts])


def triple(value: float, draws: Floats) -> list[float | None]:
    """A value and its 95 % interval; None for what is not finite."""
    # An order statistic, since a mean of two is not defined if one is infinite.
    low, high = np.quantile(draws, (0.025, 0.975), method="inverted_cdf")
    return [_short(each) if np.isfinite(each) else None for each in (value, low, high)]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def hull(sizes: Floats, quality: Floats) -> list[int]:
    """The points on the upper hull of quality over log bytes, as far as it rises, from the fewest bytes on.

    Interpolation in log bytes favours the codec: a mixture of two settings needs more bytes for the same quality.
    """
    best: list[int] = []
    logs, good = np.log(sizes).tolist(), quality.tolist()
    for point in np.lexsort((-quality, sizes)).tolist():
        if best and good[point] <= good[best[-1]]:
            continue
        while len(best) > 1:
            before, last = best[-2:]
            width, height = logs[point] - logs[before], good[point] - good[before]
            if (good[last] - good[before]) * width > height * (logs[last] - logs[before]):
                break
            best.pop()
        best.append(point)
    return best


def bytes_at(sizes: Floats, quality: Floats, wanted: Floats) -> Floats:
    """Bytes on the hull at the wanted qualities: 0 below its first point, infinite if it never gets so good."""
    on = hull(sizes, quality)
    found: Floats = np.exp(np.interp(wanted, quality[on], np.log(sizes[on]), left=-np.inf, right=np.inf))
    return found


def codec_ratios(
    sizes: Sample, quality: Sample, ours: Sequence[int], curves: Mapping[str, tuple[Sample, Sequence[int]]]
) -> Iterator[dict[str, Any]]:
    """For each of our points, how many times as many bytes every codec needs for the same quality.

    A codec that never gets so good has None, one that is better at its smallest has 0. `measured` is the range of its
    points in the same unit, and `best` is the codec that needs the fewest bytes, with its container.
    """

    def ratios(draw: int | None) -> Floats:  # [curves, ours]
        def at(sample: Sample) -> Floats:
            return sample.value if draw is None else sample.draws[draw]

        wanted, paid = at(quality)[ours], at(sizes)[ours]
        return np.stack([bytes_at(at(s)[rows], at(quality)[rows], wanted) / paid for s, rows in curves.values()])

    value, draws = ratios(None), np.stack([ratios(draw) for draw in range(DRAWS)])
    names = [*curves]
    real = [names.index(name) for name in names if name != BARE]
    spans = [np.array([s.value[rows].min(), s.value[rows].max()]) for s, rows in curves.values()]

    def of(column: int) -> dict[str, Any]:
        paid = sizes.value[ours[column]]
        found: dict[str, Any] = {
            name: {
                "ratio": triple(value[row, column], draws[:, row, column]),
                "measured": [_short(x) for x in span / paid],
            }
            for row, (name, span) in enumerate(zip(names, spans, strict=True))
        }
        # Of several that are out of range, the one whose range says least in our favour.
        first = min(real, key=lambda row: (value[row, column], spans[row][int(value[row, column] > 0)]))
        least = triple(value[real, column].min(), draws[:, real, column].min(1))
        return found | {"best": {"codec": names[first], "ratio": least, "measured": found[names[first]]["measured"]}}

    return (of(column) for column in range(len(ours)))
