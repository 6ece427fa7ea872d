"""Quality over bytes for people: a Markdown table per measure, remarks, and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rate_figures import BARE, CURVES
from testbed.terminal import markdown_table, print_table, short

MEASURES = {"cider": "CIDEr", "top1": "label top 1", "label_bits": "label bits"}
PARTS = {"prefix": "v", "groups": "s", "budget": "x"}  # kinds of points and their markers
LIMITS = (250, 400)  # payload bytes of the remarks


def print_run(run: Mapping[str, Any]) -> None:
    """Prints the tables and the remarks."""
    for task in _tasks(run):
        for measure in _measures(task):
            print_table(_table(task, measure))
            print("\n".join(_remarks(task, measure)), end="\n\n")
    for task in _tasks(run)[:1]:
        print_table(_coder_table(task))
        print_table(_budget_table(task))


def markdown(run: Mapping[str, Any]) -> str:
    """All tables in one page of Markdown."""
    codecs = "a tail that was trained on coded pictures" if run["codec_tail"] else "the bundle's tail"
    parts = [f"# {run['bundle']}: quality over bytes\n\nTier {run['tier']}; pictures are answered with {codecs}.\n"]
    for task in _tasks(run):
        for measure in _measures(task):
            remarks = "".join(f"- {line}\n" for line in _remarks(task, measure))
            title = f"## {MEASURES[measure]}, {task['photos']} photos"
            parts.append("\n\n".join([title, _table(task, measure) + "\n" + remarks]))
    parts += [f"## Coder\n\n{_coder_table(task)}\n## Byte budgets\n\n{_budget_table(task)}" for task in _tasks(run)[:1]]
    return "\n".join(parts)


def _tasks(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [run[name] for name in ("captions", "labels") if run[name]]


def _measures(task: Mapping[str, Any]) -> list[str]:
    return [name for name in MEASURES if name in task["hulls"]]


def _table(task: Mapping[str, Any], measure: str) -> str:
    """Our points, and each codec's on its hull."""
    columns = ("sent", "bytes", f"{MEASURES[measure]} (95 %)", f"of {task['top']}", "bytes of the best picture codec")
    rows: list[tuple[str, ...]] = [columns]
    on_hull = {name for curve, names in task["hulls"][measure].items() if curve != BARE for name in names}
    for point in task["points"]:
        best = point.get(f"{measure}_codec_bytes", {}).get("best")
        if point["kind"] in CURVES and point["name"] not in on_hull:
            continue
        codec = f"{_times(best)}, {best['codec']}" if best else ""
        rows.append(
            (point["name"], f"{point['bytes'][0]:.0f}", _span(point[measure]), _span(point[f"{measure}_to_top"]), codec)
        )
    return markdown_table(rows)


def _span(figure: Sequence[float | None]) -> str:
    value, low, high = ("-" if each is None else f"{each:.3f}" for each in figure)
    return f"{value} ({low} to {high})"


def _times(found: Mapping[str, Any]) -> str:
    """How many times our bytes; beyond the range that was measured, only a bound."""
    least, most = found["measured"]
    value, *interval = (
        f"> {most:.1f}" if each is None else f"{each:.1f}" if each else f"< {least:.1f}" for each in found["ratio"]
    )
    return f"{value} times ({' to '.join(interval)})"


def _remarks(task: Mapping[str, Any], measure: str) -> Iterator[str]:
    name = MEASURES[measure]
    whole = [point for point in task["points"] if point["kind"] in ("level", "budget")]
    for limit in LIMITS:
        if within := [point for point in whole if point["bytes"][0] <= limit]:
            best = max(within, key=lambda point: point[measure][0])
            sent = f"{best['name']}, {best['bytes'][0]:.0f} bytes"
            yield f"at most {limit} bytes: {sent}, {_span(best[f'{measure}_to_top'])} of {task['top']}'s {name}"
    hurt = [f"{step['from']} to {step['to']}" for step in task["steps"] if (step[measure][2] or 0.0) < 0]
    yield f"more bytes hurt {name} by more than noise: {', '.join(hurt) or 'never'}"


def _coder_table(task: Mapping[str, Any]) -> str:
    columns = ("level", "bytes", "entropy of its tables", "above it, %", "without header, %", "zstd -19", "int8")
    overhead = ("overhead_percent", "overhead_without_header_percent")
    keys = ("level", "bytes", "entropy_bytes", *overhead, "zstd19_bytes", "int8_bytes")
    return markdown_table([columns, *(tuple(short(each[key]) for key in keys) for each in task["coder"])])


def _budget_table(task: Mapping[str, Any]) -> str:
    columns = ("budget, bytes of the features", "mean to budget", "share above it", "choosing, µs")
    keys = ("budget", "mean_to_budget", "share_above", "choosing_us_p50")
    return markdown_table([columns, *(tuple(short(each[key]) for key in keys) for each in task["budgets"])])


def plot(run: Mapping[str, Any], file: Path) -> None:
    """Quality over bytes with 95 % bands. The file's suffix decides the format, see `e2e_report.check_plot`."""
    from matplotlib.figure import Figure

    panels = [(task, measure) for task in _tasks(run) for measure in _measures(task)]
    figure = Figure(figsize=(6.5 * len(panels), 4.8), layout="constrained")
    for axes, (task, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, task, measure)
        axes.set(xscale="log", xlabel="bytes per photo, whole payload", ylabel=MEASURES[measure])
        axes.set_title(f"{task['photos']} photos")
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _draw(axes: Any, task: Mapping[str, Any], measure: str) -> None:
    def scatter(points: Sequence[Mapping[str, Any]], marker: str, **style: Any) -> None:
        axes.plot([p["bytes"][0] for p in points], [p[measure][0] for p in points], marker, **style)

    points = {point["name"]: point for point in task["points"]}
    of_kind = {kind: [p for p in points.values() if p["kind"] == kind] for kind in ("level", *PARTS, *CURVES)}
    curves = {"levels": of_kind["level"]}
    curves |= {name: [points[at] for at in on] for name, on in task["hulls"][measure].items() if name != BARE}
    for number, (name, curve) in enumerate(curves.items()):
        color = f"C{number}"
        scatter(curve, "o-", color=color, markersize=4, label=name)
        scatter(of_kind.get(name, ()), ".", color=color, alpha=0.4)
        _, low, high = zip(*(point[measure] for point in curve), strict=True)
        axes.fill_between([p["bytes"][0] for p in curve], low, high, color=color, alpha=0.15, linewidth=0)
    for kind, marker in PARTS.items():
        scatter(of_kind[kind], marker, color="black", markersize=5, fillstyle="none", label=kind)
