"""The fault matrix: real processes, one fault after the other, and what became of every request.

A row warms up until answers flow, brings its fault about, ends it, and waits until every accepted request has ended.
It holds when accepted = answered + reported lost, no frame has two ends, and the first answer came within 60 s of the
end of the fault. Everything is counted from the events that a user of the board would get; the board's own counters
are only compared with them. What the parts are: `ledger` counts, `processes` are the victims, `stage` is what all rows
share, `rows` are the faults, `saboteur` those inside of a process, `crowd` many boards, `camera` one to be broken.
"""

import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2

from benchmarks.faults import report
from benchmarks.faults.rows import ROWS
from benchmarks.faults.stage import Result, Row, Stage, Trial
from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle

PHOTO_PIXELS = 320  # width: what a small camera sends; decoding large ones is not what is looked at here


class RowError(AiflowError, ValueError):
    """There is no such row."""


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in the table's order; none: all that run by default. Raises RowError."""
    known = {row.name: row for row in ROWS}
    if unknown := [name for name in names if name not in known]:
        raise RowError(f"there is no row {', '.join(unknown)}: want {', '.join(known)}")
    return [row for row in ROWS if row.name in names or (row.by_default and not names)]


def play(
    rows: Sequence[Row],
    bundle: Bundle,
    photos: Sequence[bytes],
    seconds: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """The rows' results. seconds: how long each fault lasts, else each row's own time.

    A row that cannot even begin, such as a server that does not start, is a row that did not hold.
    """
    results: list[Result] = []
    small = [_small(photo) for photo in photos]
    with tempfile.TemporaryDirectory(prefix="aiflow-faults-") as folder:
        for scene in _scenes(rows):
            (where := Path(folder) / scene[0].name).mkdir()
            with Stage(where, bundle, small, say) as stage:
                for row in scene:
                    results.append(result := tried(Trial(stage, row, seconds)))
                    say(f"{len(results)} of {len(rows)}: " + " | ".join(report.cells(result)))
    return results


def _scenes(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share their brokers and servers, since loading a server takes as long as many a row."""
    scenes: list[list[Row]] = []
    for row in rows:
        if scenes and row.is_gentle and scenes[-1][-1].is_gentle:
            scenes[-1].append(row)
        else:
            scenes.append([row])
    return scenes


def tried(trial: Trial) -> Result:
    """What a row came to."""
    try:
        return trial.run()
    except Exception as error:  # whatever it is, the other rows are still worth their time
        trial.stage.say(traceback.format_exc())
        said = str(error).splitlines() or [""]
        note = f"{type(error).__name__}: {said[-1][:200]}"
        return Result(trial.row.fault, row=trial.row.name, held=False, note=note)


def _small(photo: bytes) -> bytes:
    pixels = cv2.cvtColor(decode_picture(photo), cv2.COLOR_RGB2BGR)
    height = max(1, round(pixels.shape[0] * PHOTO_PIXELS / pixels.shape[1]))
    return cv2.imencode(".jpg", cv2.resize(pixels, (PHOTO_PIXELS, height)), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
