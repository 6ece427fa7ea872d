"""A pretrained language model learns to see: it reads the tail's features among its words, and writes captions.

Its own weights do not change. The training changes a projector, which makes picture tokens of features, and low-rank
additions to its layers (models/language_model.py). It learns people's captions, the cloud's texts about the same
photos, and to answer whether a thing is in the picture.

All texts about a photo share one pass: a token sees the picture, its question and the earlier tokens of its own text.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from models.captions import QUESTION, words_of
from models.language_model import (
    AFTER_ANSWER,
    BEFORE_ANSWER,
    BEFORE_PICTURE,
    PICTURE_TOKENS,
    Pretrained,
    SeeingModel,
    pretrained,
    question,
)
from models.recipe import stage6_targets as targets
from models.recipe.precision import autocast
from models.recipe.scores import cider
from models.recipe.training import Training
from models.recipe.workspace import Workspace

NAME = "12-language"
PHOTOS = 16  # per step
CAPTIONS = 2  # of people, per photo and step, if it has as many
UNLABELLED = 0.2  # share of the photos without captions of people
LABELS_TOLD = 0.9  # share of the questions
QUESTIONS = 0.3  # share of the photos with captions that are also asked about a thing
CHECKPOINT_EVERY = 150
LIMIT, FINAL_LIMIT = 50, 200  # photos of a collection that are described, between checkpoints and at the end
MAX_TOKENS = 32  # of a text, when it is measured


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of the training and its learning rate."""

    steps: int = 1200
    learning_rate: float = 1e-3


class Segment(NamedTuple):
    """Some tokens of a photo's sequence."""

    tokens: list[int]
    parent: int | None  # the segment that it continues; None: the first one
    is_learnt: bool = False  # its tokens are what should be written


class Batch(NamedTuple):
    """Sequences of several photos, padded."""

    tokens: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T]
    sees: Tensor  # bool [B, T, T]
    read_at: Tensor  # where the next token is to be guessed, int64, as an index into B * T
    wanted: Tensor  # these tokens, int64


def run(work: Workspace, settings: Settings) -> None:
    """Writes 12-language.pt."""
    train(work, settings, pretrained(torch.bfloat16))


def train(work: Workspace, settings: Settings, model: Pretrained) -> None:
    """Teaches any language model of Llama's architecture whose tokenizer knows SmolLM2's marks of a conversation."""
    rng = np.random.default_rng(12)
    torch.manual_seed(12)
    language, tokenizer = model
    lessons, net = Lessons(work, tokenizer), SeeingModel(language)
    tail = targets.new_target(work, "edge")
    weights = list(net.learnt.parameters())
    training = Training(
        work,
        NAME,
        net.learnt,
        torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
        settings.steps,
        CHECKPOINT_EVERY,
        decay=0.99,
        evaluate=lambda averaged, limit: evaluate(work, lessons, net, tail, averaged, limit),
    )
    for _ in training.steps():
        photos, maps = lessons.some_photos(rng)
        batch = packed(photos, lessons.end)
        with torch.no_grad(), autocast():
            features = tail.features(targets.maps_of(maps, slice(None)))
        with autocast():
            x = net.embedded(batch.tokens, net.learnt.eyes(features), len(lessons.before))
            lowest = torch.finfo(x.dtype).min
            mask = torch.zeros(batch.sees.shape, dtype=x.dtype).masked_fill_(~batch.sees, lowest)[:, None]
            hidden = language.model(inputs_embeds=x, attention_mask=mask, position_ids=batch.positions, use_cache=False)
            scores = language.lm_head(hidden.last_hidden_state.flatten(0, 1)[batch.read_at])
        training.update(F.cross_entropy(scores.float(), batch.wanted, label_smoothing=0.05))
    training.finish()


class Lessons:
    """The workspace's photos and texts, in the tokens of the language model."""

    def __init__(self, work: Workspace, tokenizer: Any) -> None:
        self.words = (work / "vocabulary.txt").read_text().splitlines()
        self.tokenizer = tokenizer
        self.before = self.encoded(BEFORE_PICTURE)
        (self.end,) = self.encoded(AFTER_ANSWER)
        self.is_noun = np.load(work / "nouns.npy")
        parts = ("train", "unlabelled", "dev")
        self.maps = {part: work.array(f"maps-{part}") for part in parts}
        self.labels = {part: np.load(work / f"labels-{part}.npy") for part in parts}
        self.texts = {part: np.load(work / f"texts-{part}.npy") for part in parts}
        self.captions = np.load(work / "captions-train.npy")
        self.chances = targets.sampling_chances(np.load(work / "collections-train.npy"))
        self.all_nouns = np.concatenate([self.nouns(rows) for rows in self.captions])  # as often as photos have them

    def some_photos(self, rng: np.random.Generator) -> tuple[list[list[Segment]], np.ndarray]:
        """PHOTOS random views: their segments, and their maps [PHOTOS, 7, 7, 320]."""
        rows, maps = list[list[Segment]](), list[np.ndarray]()
        for _ in range(PHOTOS):
            if len(self.texts["unlabelled"]) and rng.random() < UNLABELLED:
                part, view, captions = "unlabelled", int(rng.integers(len(self.texts["unlabelled"]))), None
            else:
                photo = int(rng.choice(len(self.captions), p=self.chances))
                views = len(self.texts["train"]) // len(self.captions)
                part, view = "train", photo + len(self.captions) * int(rng.integers(views))
                captions = self.captions[photo]
            rows.append(self.segments(part, view, captions, rng))
            maps.append(np.asarray(self.maps[part][view]))
        return rows, np.stack(maps)

    def segments(self, part: str, view: int, captions: np.ndarray | None, rng: np.random.Generator) -> list[Segment]:
        """The picture, the wish for a caption and captions, and a question whether a thing is there."""
        labels = self.text(self.labels[part][view]) if rng.random() < LABELS_TOLD else ""
        found = [Segment([*self.before, *[self.end] * PICTURE_TOKENS], None)]
        found.append(Segment(self.asked(QUESTION, labels), 0))
        known = [] if captions is None else [row for row in captions if row[1] != PAD and UNKNOWN not in row]
        of_people = [known[i] for i in rng.permutation(len(known))[:CAPTIONS]]
        captions_learnt = (self.encoded(self.text(row)) for row in (*of_people, self.texts[part][view]))
        found += [Segment([*tokens, self.end], 1, is_learnt=True) for tokens in captions_learnt]
        if captions is not None and rng.random() < QUESTIONS:
            seen = self.nouns(captions)
            is_there = bool(len(seen)) and rng.random() < 0.5
            noun = int(rng.choice(seen if is_there else self.all_nouns))
            if is_there or noun not in seen:
                found.append(Segment(self.asked(is_there_question(self.words[noun]), labels), 0))
                answer = [*self.encoded("yes" if is_there else "no"), self.end]
                found.append(Segment(answer, len(found) - 1, is_learnt=True))
        return found

    def questions(self, captions: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
        """Of FINAL_LIMIT photos: the photo, a question and the right answer, two for each."""
        rng, rows, words, answers = np.random.default_rng(0), list[int](), list[str](), list[str]()
        for photo in rng.permutation(len(captions))[:FINAL_LIMIT]:
            seen = self.nouns(captions[photo])
            for answer, nouns in (("yes", seen), ("no", self.all_nouns[~np.isin(self.all_nouns, seen)])):
                if len(nouns):
                    rows.append(int(photo))
                    words.append(is_there_question(self.words[rng.choice(nouns)]))
                    answers.append(answer)
        return np.array(rows), words, answers

    def nouns(self, captions: np.ndarray) -> np.ndarray:
        """The nouns of a photo's captions, each once."""
        words = np.unique(captions)
        found: np.ndarray = words[self.is_noun[words]]
        return found

    def text(self, row: Any) -> str:
        """Ids of words to a text."""
        return " ".join(self.words[i] for i in row if i not in (PAD, BOS, EOS))

    def asked(self, words: str, labels: str) -> list[int]:
        """What follows the picture, up to the answer."""
        return self.encoded(question(words, labels) + BEFORE_ANSWER)

    def encoded(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def is_there_question(noun: str) -> str:
    return f"Is there {'an' if noun[0] in 'aeiou' else 'a'} {noun} in the picture? Answer yes or no."


def packed(photos: list[list[Segment]], padding: int) -> Batch:
    """A sequence per photo. A token sees its own segment up to itself, and the whole segments that this continues."""
    longest = max(sum(len(segment.tokens) for segment in segments) for segments in photos)
    tokens = torch.full((len(photos), longest), padding)
    positions = torch.zeros_like(tokens)
    sees = torch.eye(longest, dtype=torch.bool).repeat(len(photos), 1, 1)
    read_at, wanted = list[int](), list[int]()
    for row, segments in enumerate(photos):
        spans, start = list[slice](), 0
        for segment in segments:
            size, parent = len(segment.tokens), segment.parent
            span = slice(start, start := start + size)
            spans.append(span)
            before = -1 if parent is None else spans[parent].stop - 1
            first = 0 if parent is None else int(positions[row, before]) + 1
            tokens[row, span] = torch.tensor(segment.tokens)
            positions[row, span] = torch.arange(first, first + size)
            sees[row, span, span] = torch.ones(size, size, dtype=torch.bool).tril()
            if segment.is_learnt:
                read_at += [row * longest + at for at in (before, *range(span.start, span.stop - 1))]
                wanted += segment.tokens
            while parent is not None:
                sees[row, span, spans[parent]] = True
                parent = segments[parent].parent
    return Batch(tokens, positions, sees, torch.tensor(read_at), torch.tensor(wanted))


@torch.inference_mode()
def write(
    lessons: Lessons, net: SeeingModel, tail: targets.Target, maps: np.ndarray, asked: list[list[int]]
) -> list[str]:
    """Greedy answers about each of some maps; asked: as of `Lessons.asked`."""
    language, first = net.language, len(lessons.before)
    longest = max(map(len, asked))
    before = [*lessons.before, *[lessons.end] * PICTURE_TOKENS]
    rows = torch.tensor([[lessons.end] * (longest - len(each)) + before + each for each in asked])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * (len(before) + len(each)) for each in asked])
    with autocast():
        pictures = net.learnt.eyes(tail.features(targets.maps_of(maps, slice(None))))
        x = language.get_input_embeddings()(rows)
        for row, each in enumerate(asked):
            at = longest - len(each) + first
            x[row, at : at + PICTURE_TOKENS] = pictures[row].to(x.dtype)
        ids = language.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)
    return [text.strip() for text in lessons.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def evaluate(
    work: Workspace,
    lessons: Lessons,
    net: SeeingModel,
    tail: targets.Target,
    weights: dict[str, Tensor],
    limit: int | None = None,
) -> dict[str, float]:
    """CIDEr of greedy captions of some dev photos, per collection; at the end also the share of questions that are
    answered right: for each photo one about a thing that people have named, and one about another thing.
    """
    own = {name: value.clone() for name, value in net.learnt.state_dict().items()}
    net.learnt.load_state_dict(weights)
    ids = {word: number for number, word in enumerate(lessons.words)}

    def answers(rows: np.ndarray, words: list[str]) -> list[str]:
        labels, found = lessons.labels["dev"], list[str]()
        for at in range(0, len(rows), 50):
            some = rows[at : at + 50]
            asked = [lessons.asked(*each) for each in zip(words[at:], map(lessons.text, labels[some]), strict=False)]
            found += write(lessons, net, tail, lessons.maps["dev"][some], asked)
        return found

    def described(rows: np.ndarray) -> list[list[int]]:
        texts = answers(rows, [QUESTION] * len(rows))
        return [[ids.get(word, UNKNOWN) for word in words_of(text)] for text in texts]

    figures = cider(work, "dev", described, LIMIT if limit else FINAL_LIMIT)
    if limit is None:
        rows, words, wanted = lessons.questions(np.load(work / "captions-dev.npy"))
        right = [answer == want for answer, want in zip(answers(rows, words), wanted, strict=True)]
        figures["questions_right"] = float(np.mean(right))
    net.learnt.load_state_dict(own)
    return figures
