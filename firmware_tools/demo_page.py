"""The result of each photo of a demo, the summary, and the page that shows both.

The page is one file: pictures are data URIs, and a Content-Security-Policy forbids everything else. All text from files
and from the network is escaped.
"""

import base64
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from edge_runtime.picture_checks import decode_picture
from edge_runtime.wire import Event
from firmware_tools.event_parts import answered_by, labels, marked, stages
from testbed.processes import read_event
from testbed.sample_photos import Photo, shrunk_jpeg
from testbed.terminal import short

PREVIEW_PIXELS = 480  # a phone's screen has as many CSS pixels or fewer


@dataclass(frozen=True, slots=True)
class PhotoResult:
    """A photo and its events so far. Times count from capture to the event's arrival at a subscriber."""

    photo: Photo
    first: Event | None = None  # the first with a text
    last: Event | None = None
    first_ms: float | None = None
    last_ms: float | None = None

    @property
    def is_final(self) -> bool:
        return self.last is not None and self.last.final

    @property
    def is_verified(self) -> bool:
        return self.last is not None and self.last.type == "update"

    @property
    def draft(self) -> str:
        """The board's own text."""
        return self.first.text if self.first and self.first.type != "update" else ""

    def followed(self, event: Event, arrived_unix: float) -> "PhotoResult":
        ms = 1e3 * (arrived_unix - event.captured.timestamp())
        result = replace(self, last=event, last_ms=ms)
        return replace(result, first=event, first_ms=ms) if self.first is None and event.text else result


@dataclass(frozen=True, slots=True)
class AtLevel:
    """The server's answer about a photo whose features are sent at one level."""

    bytes: int  # of the whole MQTT payload
    text: str
    scores: Mapping[str, float]  # of the likeliest labels, best first


@dataclass(frozen=True, slots=True)
class TaughtQuestion:
    """The question of the demo, and the photos that it was taught with."""

    name: str
    photos: Mapping[str, Sequence[str]]  # names of photos by class
    views: int  # crops and mirror images of these photos

    def answer(self, result: PhotoResult) -> str:
        """An answer about a photo, such as "nobody 70 %, somebody 30 %"; not about one that it was taught."""
        if self._taught(result):
            return "taught with this photo"
        scores = self._scores(result)
        return labels(scores) or "-"

    def summary(self, results: Sequence[PhotoResult]) -> str:
        """A sentence about what it was taught with, and one about how sure it is of the other photos."""
        of_class = "; ".join(f"{label}: {', '.join(names)}" for label, names in self.photos.items())
        count = sum(map(len, self.photos.values()))
        text = f"{self.name} was taught with {self.views} views of {count} photos ({of_class})."
        sure = [max(scores.values()) for r in results if not self._taught(r) and (scores := self._scores(r))]
        if sure:
            text += (
                f" Of its answers about {len(sure)} others it is {100 * min(sure):.0f} to {100 * max(sure):.0f} % sure."
            )
        return f"{text} These photos are few: ten per class are a good start."

    def _taught(self, result: PhotoResult) -> bool:
        return any(result.photo.name in names for names in self.photos.values())

    def _scores(self, result: PhotoResult) -> Mapping[str, float]:
        return result.last.answers.get(self.name, {}) if result.last else {}


class Results:
    """The results of all photos. It counts messages that are not events of these photos: anybody may publish there."""

    def __init__(self, photos: Sequence[Photo]) -> None:
        self.photos = [PhotoResult(photo) for photo in photos]
        self.question: TaughtQuestion | None = None
        self.ignored = 0

    @property
    def all_final(self) -> bool:
        return all(result.is_final for result in self.photos)

    def add(self, payload: bytes, arrived_unix: float) -> PhotoResult | None:
        """Takes an event, whose `picture` is `<number>.jpg`; returns the changed result, or None if it is ignored."""
        event = read_event(payload)
        number = event.picture.removesuffix(".jpg") if event else ""
        if not event or not re.fullmatch("[0-9]{4,6}", number) or int(number) >= len(self.photos):
            self.ignored += 1
            return None
        changed = self.photos[int(number)] = self.photos[int(number)].followed(event, arrived_unix)
        return changed


def summary(results: Results) -> dict[str, Any]:
    """Figures over all photos. Figures of the verification cover the photos that a server answered."""
    ended = [result.last for result in results.photos if result.last and result.is_final]
    verified = [event for event in ended if event.type == "update"]
    sent = [event for event in ended if event.bytes_up]
    figures: dict[str, Any] = {"photos": len(results.photos), "lost": sum(event.type == "lost" for event in ended)}
    if sent:
        up, jpeg = (statistics.fmean(getattr(e, name) for e in sent) for name in ("bytes_up", "jpeg_bytes"))
        figures |= {"bytes_mean": up, "jpeg_bytes_mean": jpeg, "jpeg_to_bytes": jpeg / up}
    if verified:
        figures |= {
            "verified": len(verified),
            "accepted": sum(event.accepted for event in verified),
            "proposed": sum(event.proposed for event in verified),
            "tokens": sum(len(event.tokens) for event in verified),
            "passes": sum(event.passes for event in verified),
        }
    first_ms = [r.first_ms for r in results.photos if r.first_ms is not None]
    last_ms = [r.last_ms for r in results.photos if r.is_verified and r.last_ms is not None]
    for name, times in (("first_text_ms", first_ms), ("verified_text_ms", last_ms)):
        if times:
            figures[name] = statistics.median(times)
    if results.ignored:
        figures["ignored_events"] = results.ignored
    return figures


# By eye: what is wrong with the captions of the shipped bundle. A caption that has changed since has no judgement.
JUDGED = {
    ("cat", "a cat sitting on top of a sink"): "half right: a cat, and no sink",
    ("astronaut", "a man in a red helmet is holding a football"): "wrong: an astronaut, with her helmet beside her",
    ("photographer", "a man is holding a camera while standing on a camera"): "half right: he does not stand on it",
    ("temple", "a large clock tower sitting on top of a field"): "half right: a tower, without a clock, above a lake",
    ("rocket", "a group of people standing in front of a large plane"): "wrong: a rocket before its start, and nobody",
    (
        "portrait",
        "a man in a black jacket is standing in front of a white building",
    ): "half right: a woman in a black uniform, in front of a flag",
    ("flower", "a vase filled with lots of bananas on a table"): "wrong: a dahlia in a garden",
    ("coffee", "a wooden table with a wooden table and a cup"): "right, but clumsy",
}

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--new:#1a7f37;--old:#b35900}
@media(prefers-color-scheme:dark){:root{--new:#4cc46a;--old:#e0904d}}
body{font:16px/1.45 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
h1{font-size:1.4rem;margin:.3rem 0}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.6rem;margin:1rem 0}
dl div{background:var(--soft);border-radius:.5rem;padding:.5rem .7rem}
dt{font-size:.8rem;opacity:.75}dd{margin:0;font-size:1.25rem;font-variant-numeric:tabular-nums}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem}
article{border:1px solid var(--line);border-radius:.7rem;overflow:hidden;display:flex;flex-direction:column}
img{width:100%;aspect-ratio:4/3;object-fit:contain;background:var(--soft)}
section{padding:.6rem .8rem .8rem}p{margin:.25rem 0}small{opacity:.75}
.text{font-size:1.1rem}ins{color:var(--new);text-decoration:none;font-weight:600}del{color:var(--old)}
.rates label{padding:.1rem .5rem;border:1px solid var(--line);border-radius:1rem;cursor:pointer}
body>input{position:absolute;opacity:0}.rate{display:none;border-top:1px solid var(--line);padding-top:.3rem}
.bar{display:flex;height:.5rem;border-radius:.25rem;overflow:hidden;margin:.5rem 0 .2rem}
.bar i:nth-child(odd){background:#4a7fd4}.bar i:nth-child(even){background:#c9a13b}
"""


def page(results: Results, title: str, note: str, levels: Sequence[Sequence[AtLevel]] = ()) -> str:
    """levels: of each photo, its answer at every level, the coarsest first; the page lets people choose one."""
    count = len(levels[0]) if levels else 0
    choices, style = _level_choices(count)
    figures = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(short(value))}</dd></div>"
        for name, value in summary(results).items()
    )
    rates = levels or [()] * len(results.photos)
    question = results.question
    cards = "\n".join(_card(result, rate, question) for result, rate in zip(results.photos, rates, strict=True))
    about = f"<p>{escape(question.summary(results.photos))}</p>\n" if question else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src data:;style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
{choices}<h1>{escape(title)}</h1><p>{escape(note)}</p>
<dl>{figures}</dl>
{about}{_level_labels(count)}<main>
{cards}
</main>
<p><small>Bytes are whole MQTT payloads; the JPEG beside them is of the same 224 x 224 pixels at quality 75. Times to a
text run from capture to the event's arrival at a subscriber. <del>Words</del> of the draft that the server did not
keep, <ins>words</ins> that it wrote itself.</small></p>
</body></html>
"""


def _level_choices(count: int) -> tuple[str, str]:
    """Radio buttons for the levels, and the style that shows the chosen one: the page needs no script."""
    button = '<input type="radio" name="level" id="level{}"{}>'
    inputs = "".join(button.format(level, " checked" * (level == count - 1)) for level in range(count))
    rules = "".join(
        f"#level{level}:checked~main .level{level}{{display:block}}"
        f"#level{level}:checked~.rates label:nth-of-type({level + 1}){{background:var(--new);color:Canvas}}"
        f"#level{level}:focus-visible~.rates label:nth-of-type({level + 1}){{outline:2px solid}}"
        for level in range(count)
    )
    return inputs, rules


def _level_labels(count: int) -> str:
    if not count:
        return ""
    labels = "".join(f'<label for="level{level}">{level}</label> ' for level in range(count))
    return f'<p class="rates">Rate, coarse to fine: {labels}<small>what the server says at this level</small></p>\n'


def _card(result: PhotoResult, levels: Sequence[AtLevel], question: TaughtQuestion | None) -> str:
    name, preview = escape(result.photo.name), shrunk_jpeg(decode_picture(result.photo.data), PREVIEW_PIXELS, 80)
    data = base64.b64encode(preview).decode()
    parts = [f'<img alt="{name}" src="data:image/jpeg;base64,{data}"><section><p><small>{name}']
    if result.photo.credit:
        parts.append(f" · {escape(result.photo.credit)}")
    parts.append("</small></p>")
    event = result.last
    if event is None:
        return f"<article>{''.join(parts)}<p>no answer</p></section></article>"
    if result.is_verified:
        if result.draft:
            parts.append(f"<p>draft: {_marked_html(result.draft, event.text, 'del')}</p>")
        parts.append(f'<p class="text">{_marked_html(event.text, result.draft or event.text, "ins")}</p>')
    else:
        parts.append(f'<p class="text">{escape(event.text)}</p>')
    if result.photo.credit and (judged := JUDGED.get((result.photo.name, event.text))):
        parts.append(f"<p><small>caption {escape(judged)}</small></p>")
    if event.scores:
        doubt = " · not sure" if event.unsure else ""
        parts.append(f"<p><small>{escape(labels(event.scores))}{doubt}</small></p>")
    if question:
        parts.append(f"<p><small>{escape(question.name)}: {escape(question.answer(result))}</small></p>")
    if event.type == "lost":
        parts.append(f"<p><small>lost: {escape(event.why)}</small></p>")
    times = stages(event)
    bar = "".join(f'<i style="flex:{ms:.2f}" title="{escape(stage)} {ms:.1f} ms"></i>' for stage, ms in times.items())
    sent = f"{event.bytes_up} B, JPEG {event.jpeg_bytes} B" if event.bytes_up else "nothing sent"
    counts = f" · {event.accepted} of {event.proposed} tokens accepted" if event.proposed else ""
    shown = ", ".join(f"{escape(stage)} {ms:.1f}" for stage, ms in times.items())
    parts.append(
        f'<div class="bar">{bar}</div><p><small>{shown} ms</small></p>'
        f"<p><small>{sent} · {escape(answered_by(event))}{counts}</small></p>"
    )
    for level, at in enumerate(levels):
        known = f"<br><small>{escape(labels(at.scores))}</small>" if at.scores else ""
        said = f"<small>level {level}, {at.bytes} B:</small> {escape(at.text)}{known}"
        parts.append(f'<p class="rate level{level}">{said}</p>')
    parts.append("</section>")
    return f"<article>{''.join(parts)}</article>"


def _marked_html(text: str, other: str, tag: str) -> str:
    runs = marked(text, other)
    return " ".join(f"<{tag}>{escape(run)}</{tag}>" if differs else escape(run) for run, differs in runs)
