"""`aiflow bench`: measures one part, on the demo's photos or the user's own; benchmarks/ says what a figure means."""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.inference.preprocess import to_input
from firmware_tools.evaluate import CAPTIONS_HELP
from models import SHIPPED_BUNDLE
from testbed.argument_types import PHOTOS, hf_model, new_file, number
from testbed.processes import interrupted_once
from testbed.sample_photos import collect, frames
from testbed.terminal import print_figures, print_table, track

BACKENDS = ("onnx", "litert")
PARTS = {
    "codec": "the entropy coder, on the photos' symbols",
    "static": "a static camera: bytes against an earlier frame, and frames that need no answer of their own",
    "capture": "CPU time and memory of live cameras, and of a whole board with them, against converting every frame",
    "stops": "boards in several states that get SIGTERM: their exit codes, and how long it takes",
    "device": "a board alone: stages, memory",
    "users": "memory of the live page after many events; what Home Assistant and Prometheus cost a board",
    "server": "a server's engine: texts per second, with drafts and without",
    "speculation": "ways to write the same captions: target alone, drafts of the board, of the server, of transformers",
    "gateway": "a server behind a broker: requests per second",
    "scale": "many simulated boards, one server or several with replicas on Ray, also while some are killed",
    "faults": "the fault matrix: the outcome of every request",
    "rate": "quality over bytes: levels, prefixes and budgets against JPEG, WebP and AVIF through the same target",
    "e2e": "board, brokers and servers over simulated links: each paradigm against sending pictures",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, summary in PARTS.items():
        part = parts.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == "e2e":
            _add_e2e_arguments(part)
        elif name == "rate":
            _add_rate_arguments(part)
        else:
            part.add_argument("--images", **PHOTOS, help="photos (default: the demo's)")
            _number(part, "--limit", 64, "at most N photos")
            _add_arguments(part, name)
        part.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, metavar="DIR", help="default: the shipped one")
        part.add_argument("--json", type=new_file, metavar="FILE", help="write the figures to FILE")


def _number(parser: argparse.ArgumentParser, name: str, default: int, what: str) -> None:
    parser.add_argument(name, type=number, default=default, metavar="N", help=f"{what} (default: {default})")


def _seconds(parser: argparse.ArgumentParser, name: str, default: float, what: str) -> None:
    parser.add_argument(name, type=float, default=default, metavar="S", help=f"{what} (default: {default:g})")


def _add_e2e_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", **PHOTOS, required=True, help="photos")
    parser.add_argument("--captions", type=Path, required=True, metavar="TSV", help=CAPTIONS_HELP)
    parser.add_argument("--split", metavar="NAME", help="only photos of this split")
    parser.add_argument("--limit", type=number, metavar="N", help="only the first N photos")
    parser.add_argument("--profile", nargs="+", required=True, metavar="NAME", help="links, one after the other")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="play this after warming up on the profile")
    parser.add_argument(
        "--paradigms", metavar="A,B,...", help="default: device,offload,offload-small,split,speculative,policy"
    )
    parser.add_argument(
        "--target", choices=["bundle", "lm"], default="bundle", help="of the cloud server (default: bundle)"
    )
    parser.add_argument("--board-slowdown", type=float, default=1.0, metavar="X", help="a board X times slower")
    parser.add_argument("--markdown", type=new_file, metavar="FILE", help="write a table of all links to FILE")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="draw the figures into FILE, such as e2e.png")
    parser.epilog = "--json: a list if there are several profiles"


def _add_rate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", **PHOTOS, help="photos with captions")
    parser.add_argument("--captions", type=Path, metavar="TSV", help=CAPTIONS_HELP)
    parser.add_argument("--split", metavar="NAME", help="only photos of this split")
    parser.add_argument("--classes", **PHOTOS, help="photos named class/name, to measure labels")
    parser.add_argument("--limit", type=number, metavar="N", help="only N photos of either, evenly spread")
    parser.add_argument(
        "--tier", choices=["edge", "cloud"], default="cloud", help="the tier that answers (default: cloud)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="onnx", help="the head's runtime (default: onnx)")
    _number(parser, "--threads", 1, "threads of the networks")
    parser.add_argument(
        "--budgets", type=number, nargs="+", default=[150, 250, 400], metavar="N", help="bytes (default: 150 250 400)"
    )
    parser.add_argument("--quick", action="store_true", help="18 settings of the picture codecs, not 75")
    parser.add_argument("--codec-tail", type=Path, metavar="FILE", help="a tail trained on coded pictures, for these")
    parser.add_argument("--markdown", type=new_file, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="draw the figures into FILE, such as rate.png")
    parser.epilog = "Needs --images and --captions, or --classes, or all three."


def _add_arguments(parser: argparse.ArgumentParser, part: str) -> None:
    if part in ("codec", "static", "server", "speculation", "gateway", "scale"):
        parser.add_argument(
            "--backend", choices=BACKENDS, default="onnx", help="runtime of head and draft (default: onnx)"
        )
    if part in ("server", "speculation", "gateway", "scale"):
        usual = "cloud" if part == "speculation" else "edge"
        tiers = ["edge", "cloud", *(["lm"] if part in ("server", "speculation") else [])]
        parser.add_argument("--tier", choices=tiers, default=usual, help=f"default: {usual}")
    if part in ("server", "speculation", "gateway"):
        _number(parser, "--threads", 1, "threads of the networks")
    match part:
        case "static":
            _number(parser, "--frames", 20, "frames of each scene")
            parser.add_argument("--reuse-distance", type=float, default=0.2, metavar="X", help="default: 0.2")
        case "capture":
            _seconds(parser, "--interval", 10.0, "time between frames")
            _number(parser, "--cameras", 1, "cameras at once")
            _seconds(parser, "--seconds", 10.0, "duration of each measurement")
            _number(parser, "--rounds", 3, "repeat all this often, for medians")
        case "stops":
            _number(parser, "--boards", 10, "boards in each state, one after the other")
            states = ("live", "opening", "stalled", "broker-away", "folder")
            parser.add_argument("--state", choices=states, help="of cameras or broker (default: each)")
        case "device":
            parser.add_argument("--backend", choices=BACKENDS, help="runtime of head and draft (default: both)")
            _number(parser, "--frames", 500, "frames that the board handles")
        case "users":
            _number(parser, "--events", 10_000, "events for the page")
            _seconds(parser, "--seconds", 120.0, "time that the boards run")
            _number(parser, "--boards", 2, "boards of each kind")
        case "speculation":
            parser.add_argument(
                "--target",
                type=hf_model,
                metavar="hf:FOLDER",
                help="a model of transformers (default: the bundle's tier)",
            )
            parser.add_argument(
                "--assistant", metavar="FOLDER", help="with --target: a smaller language model that proposes tokens"
            )
            _number(parser, "--rounds", 5, "timed rounds")
        case "gateway":
            _seconds(parser, "--seconds", 10.0, "duration of each half")
        case "scale":
            parser.add_argument(
                "--replicas",
                type=int,
                nargs="+",
                default=[0, 1, 2],
                metavar="N",
                help="0: without Ray (default: 0 1 2)",
            )
            _number(parser, "--boards", 1000, "simulated boards")
            _seconds(parser, "--interval", 10.0, "time between a board's requests")
            _seconds(parser, "--seconds", 60.0, "duration of each run")
        case "faults":
            from benchmarks.faults.rows import ROWS

            parser.add_argument(
                "--row", action="extend", nargs="+", default=[], metavar="NAME", help="default: all but soak"
            )
            parser.add_argument(
                "--seconds", type=float, metavar="S", help="duration of each fault (default: each row's own)"
            )
            parser.add_argument("--markdown", type=new_file, metavar="FILE", help="write the table to FILE")
            rows = "\n".join(f"  {row.name:26}{row.title}" for row in ROWS)
            parser.epilog = f"Needs mosquitto, which it kills and freezes. Rows:\n{rows}"


def run(args: argparse.Namespace) -> int:
    """Prints the figures and writes the JSON. Returns 1 if a row of the fault matrix did not hold."""
    match args.part:
        case "faults":
            return faults(args)
        case "e2e":
            end_to_end(args)
        case "rate":
            rate(args)
        case _:
            if args.part == "speculation" and args.assistant and not args.target:
                raise ConfigError("--assistant proposes to a model of transformers: name it with --target hf:FOLDER")
            figures = measure(args, open_bundle(args.bundle), list(frames(args.images, args.limit)))
            if args.part == "speculation" or getattr(args, "tier", "") == "lm":
                from benchmarks.speculation import markdown

                print_table(markdown(figures))
            else:
                print_figures(figures)
            write(args, figures)
    return 0


def write(args: argparse.Namespace, figures: Any, markdown: str = "") -> None:
    """Into the files that the arguments name."""
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if markdown and args.markdown:
        args.markdown.write_text(markdown, encoding="utf-8")


def faults(args: argparse.Namespace) -> int:
    """Runs the fault matrix, shows it as a table and writes it."""
    from rich.console import Console

    from benchmarks.faults import chosen, play, report

    rows = chosen(args.row)
    photos = [photo.data for photo in collect(args.images, limit=args.limit)]
    console = Console(stderr=True, log_path=False)
    logging.getLogger("edge_runtime").setLevel(logging.ERROR)  # lost connections are expected here
    with interrupted_once():
        results = play(rows, open_bundle(args.bundle), photos, args.seconds, console.log)
    print_table(table := report.markdown(results))
    write(args, {"rows": [asdict(result) for result in results]}, table)
    return int(any(result.held is False for result in results))


def end_to_end(args: argparse.Namespace) -> None:
    """Runs the paradigms over the links, shows tables and writes the files that the arguments name."""
    from benchmarks import e2e, e2e_report
    from benchmarks.quality import Photos
    from models.captions import captions_of
    from testbed.link_simulator import read_trace
    from testbed.shaping import named

    paradigms = args.paradigms.split(",") if args.paradigms else e2e.DEFAULT
    e2e.ordered(paradigms)  # mistakes are found before anything starts
    if args.plot:
        e2e_report.check_plot(args.plot)
    profiles = [named(name) for name in dict.fromkeys(args.profile)]
    trace = read_trace(args.trace) if args.trace else ()
    captions = captions_of(args.captions, args.split)
    case = e2e.case_of(Photos(args.images, captions, args.limit), captions, args.board_slowdown, args.target)
    with interrupted_once():
        runs = e2e.run(open_bundle(args.bundle), case, paradigms, profiles, trace)
    e2e_report.print_runs(runs)
    write(args, runs if runs[1:] else runs[0], e2e_report.markdown(runs))
    if args.plot:
        e2e_report.plot(runs, args.plot)


def rate(args: argparse.Namespace) -> None:
    """Measures quality over bytes, shows tables and writes the files that the arguments name."""
    from benchmarks import rate, rate_report
    from benchmarks.e2e_report import check_plot
    from benchmarks.quality import EvaluationError, Photos, proven_chain
    from models.captions import captions_of

    if bool(args.images) != bool(args.captions) or not (args.images or args.classes):
        raise EvaluationError("nothing to measure: name --images and --captions, or --classes, or all three")
    if args.plot:
        check_plot(args.plot)
    captions = captions_of(args.captions, args.split) if args.captions else {}
    chain = proven_chain(open_bundle(args.bundle), "split", args.tier, args.backend, threads=args.threads)
    options: dict[str, Any] = {
        "budgets": list(dict.fromkeys(args.budgets)),
        "quick": args.quick,
        "for_pictures": rate.engine_for_pictures(chain, args.codec_tail) if args.codec_tail else None,
    }
    run: dict[str, Any] = {
        "bundle": chain.bundle.manifest.name,
        "tier": args.tier,
        "codec_tail": args.codec_tail and args.codec_tail.name,
        "captions": None,
        "labels": None,
    }
    # All photos are read first, so that a mistake in their names is found before the long part.
    captioned = rate.spread(Photos(args.images, captions), args.limit) if args.images else []
    labelled = rate.spread(Photos(args.classes), args.limit) if args.classes else []
    if captioned:
        options["progress"] = lambda photos: track(photos, "captions", len(captioned))
        run["captions"] = rate.measure_captions(chain, captioned, captions, **options)
    if labelled:
        options["progress"] = lambda photos: track(photos, "labels", len(labelled))
        run["labels"] = rate.measure_labels(chain, labelled, **options)
    rate_report.print_run(run)
    write(args, run, rate_report.markdown(run))
    if args.plot:
        rate_report.plot(run, args.plot)


def measure(args: argparse.Namespace, bundle: Bundle, pictures: list[Any]) -> dict[str, Any]:
    """pictures: uint8 RGB [H, W, 3]."""
    match args.part:
        case "capture":
            from benchmarks import capture

            return capture.run(bundle, pictures, args.interval, args.seconds, args.cameras, args.rounds)
        case "stops":
            from benchmarks import stops

            return stops.run(bundle, pictures, args.boards, [args.state] if args.state else list(stops.STATES))
        case "device":
            from benchmarks import device

            return device.run(bundle, pictures, [args.backend] if args.backend else BACKENDS, args.frames)
        case "users":
            from benchmarks import users

            return users.run(bundle, pictures, args.events, args.seconds, args.boards)
    return measure_networks(args, bundle, pictures)


def measure_networks(args: argparse.Namespace, bundle: Bundle, pictures: list[Any]) -> dict[str, Any]:
    """Measures what works with the head's output."""
    from edge_runtime.inference.networks import load_head

    head = load_head(bundle, args.backend, 1)
    if args.part == "static":
        from benchmarks import static

        return static.run(bundle, head, pictures, args.frames, args.reuse_distance)
    pixels, level = [to_input(picture) for picture in pictures], bundle.manifest.latent.default_level
    latents, head_ms = timed(head.latent, pixels)
    symbols = np.stack([latent.symbols(level) for latent in latents])
    if args.part == "codec":
        from benchmarks import codec

        return codec.run(symbols, bundle.tables, level)
    return measure_server(args, bundle, pixels, latents, symbols, head_ms)


def measure_server(
    args: argparse.Namespace, bundle: Bundle, pixels: list[Any], latents: list[Any], symbols: Any, head_ms: float
) -> dict[str, Any]:
    """Measures a target. pixels, latents, symbols: of the same photos. head_ms: from the first to the second."""
    from edge_runtime.inference.choice import Setup
    from edge_runtime.inference.labels import labels_seen
    from edge_runtime.inference.networks import load_networks

    _, draft, labels = load_networks(bundle, Setup(args.backend, 1), has_labels=True)
    assert draft
    seen, labels_ms = timed(lambda latent: labels_seen(labels, latent), latents)
    pairs = list(zip(latents, seen, strict=True))
    drafts, draft_ms = timed(lambda pair: draft.write(pair[0].symbols(), pair[1]).tokens, pairs)
    if args.tier == "lm":
        from benchmarks import speculation

        rounds = getattr(args, "rounds", 3)
        return speculation.run_language(bundle, symbols, drafts, head_ms + draft_ms, rounds, args.threads)
    match args.part:
        case "server":
            from benchmarks import server

            return server.run(bundle, symbols, drafts, args.tier, threads=args.threads)
        case "scale":
            from benchmarks import scale

            site = (args.tier, args.boards, args.interval, args.seconds, args.replicas)
            return scale.run(bundle, symbols, drafts, *site)
        case "speculation":
            from benchmarks import speculation

            settings: dict[str, Any] = {"rounds": args.rounds, "threads": args.threads}
            if args.target:  # for its pictures, the board runs head and labels for the draft alone
                settings["assistant"] = args.assistant
                before_ms = head_ms + labels_ms + draft_ms
                return speculation.run_hf(bundle, pixels, drafts, before_ms, args.target, **settings)
            return speculation.run(bundle, symbols, drafts, draft_ms, args.tier, **settings)
    from benchmarks import gateway

    return gateway.run(bundle, symbols, drafts, args.tier, seconds=args.seconds, threads=args.threads)


def timed(step: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[list[Any], float]:
    """Results of a step for each input, its median time in ms of CPU time, which other programs do not change."""
    results, times_ms = [], []
    for each in inputs:
        started = time.process_time()
        results.append(step(each))
        times_ms.append(1e3 * (time.process_time() - started))
    return results, statistics.median(times_ms)
