"""The figures of the case study for people: one Markdown table, remarks on each profile, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import AiflowError
from testbed.terminal import markdown_table, print_table, short

COLUMNS = ("link", "paradigm", "CIDEr", "bytes", "first text, ms", "verified, ms: p50, p95", "to offload", "server, ms")


def print_runs(runs: Sequence[dict[str, Any]]) -> None:
    """Prints the table, and for each profile what it does not show."""
    print_table(markdown(runs))
    for run in runs:
        print(f"\n{run['profile']}, {run['images']} photos, board {run['board_slowdown']:g} times slower")
        print("\n".join(_remarks(run)))


def _remarks(run: dict[str, Any]) -> list[str]:
    lost = [f"{name} {figures['lost']}" for name, figures in run["paradigms"].items() if figures["lost"]]
    lines = [f"lost: {', '.join(lost)}"] if lost else []
    if policy := run["paradigms"].get("policy"):
        chosen = ", ".join(f"{name} {share:.0%}" for name, share in policy["chosen"].items())
        to_best = short(policy["verified_to_best_fixed"])
        lines.append(f"policy: {to_best} of the best fixed paradigm ({policy['best_fixed']}); chose {chosen}")
        lines.append(f"policy: without accepted drafts, verified in {short(policy['served_ms_p50'])} ms, p50")
    if escalating := run["paradigms"].get("escalate"):
        share, quality = short(escalating["escalated_share"]), short(escalating["cider_to_cloud"])
        lines.append(f"escalate: passed up a share of {share}, CIDEr {quality} of the cloud's alone")
    if quality := run["small_jpeg_quality"]:
        lines.append(f"offload-small: JPEG quality {quality}")
    if trace := run.get("trace"):
        for slot in trace["slots"]:
            where = f"{slot['from_s']:g} to {slot['to_s']:g} s, {slot['profile']}"
            lines.append(f"{where}: best {slot['best_fixed']}, policy {short(slot['policy_to_best'])} of it")
        lines.append(f"policy: {short(trace['policy_to_oracle'])} of the oracle's time to a verified text")
    lines.append(f"on {run['machine']['cores']} cores, shared by {run['machine']['shared_by']}")
    return lines


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """One table of all profiles, in Markdown."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for run in runs:
        for name, figures in run["paradigms"].items():
            p50, p95, ratio = (figures[key] for key in ("verified_ms_p50", "verified_ms_p95", "verified_ratio"))
            times = ("none", "") if p50 is None else (f"{p50:.0f}, {p95:.0f}", f"{ratio:.2f}")
            cider = "" if figures["cider"] is None else f"{figures['cider']:.3f}"
            first, server = (
                "" if figures[key] is None else f"{figures[key]:.0f}" for key in ("first_text_ms_p50", "server_ms_mean")
            )
            sent = f"{figures['bytes_mean']:.0f}"
            rows.append((run["profile"], f"`{name}`", cider, sent, first, *times, server))
    return markdown_table(rows)


def check_plot(file: Path) -> None:
    """Raises AiflowError for a suffix that matplotlib does not know."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in known:
        raise AiflowError(f"{file}: no picture format {file.suffix!r}, want one of {', '.join(sorted(known))}")


def plot(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws times by profile on the left, bytes against quality on the right. The file's suffix decides the format.

    See `check_plot` for the formats.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    times, prices = figure.subplots(1, 2, width_ratios=(2, 1))
    names = list(runs[0]["paradigms"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        color, each = f"C{index}", [run["paradigms"][name] for run in runs]
        at = [place + width * (index - (len(names) - 1) / 2) for place in range(len(runs))]
        verified, late, first = (
            [figures[key] or float("nan") for figures in each]
            for key in ("verified_ms_p50", "verified_ms_p95", "first_text_ms_p50")
        )
        times.bar(at, verified, width, color=color, label=name)
        times.plot(at, late, "_", color="black", markersize=8)
        times.plot(at, first, "o", color=color, markeredgecolor="black", markersize=5)
        if each[0]["cider"] is not None:  # in decreasing sizes, so that equal points show as rings
            prices.plot(
                max(1.0, each[0]["bytes_mean"]), each[0]["cider"], "o", color=color, markersize=14 - 1.5 * index
            )
    times.set(yscale="log", ylabel="ms", title="verified text: bar p50, dash p95; first text: dot, p50")
    times.set_xticks(range(len(runs)), [run["profile"] for run in runs])
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    prices.set(xscale="log", xlabel="bytes sent per photo (1: none)", ylabel="CIDEr", title="bytes and quality")
    figure.savefig(file, dpi=120)
