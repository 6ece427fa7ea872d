"""The targets: one text decoder per tier, trained on the symbols of the deployed head, at many rates.

The tail was trained with the bottleneck on rounded symbols and stays fixed, so its maps of all views are computed once,
each at a random rate, with the words of its labels. The cloud's decoder learns people's captions of photos, and besides
from sentences without photos, whose own nouns stand in for labels. Later the edge's smaller decoder learns the cloud's
own texts from the same features (sequence-level distillation: Kim & Rush, arXiv 1606.07947), about photos without
captions, too. So one pass of the tail serves every tier.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.backbone import FEATURES, MAP_CHANNELS, pretrained_lite0
from models.family import (
    LABEL_WORDS,
    LATENT,
    POSITIONS,
    DecoderShape,
    Dropout,
    Memory,
    Tail,
    TextDecoder,
    decoder_shapes,
)
from models.imagenet import imagenet_classes
from models.labels import label_words, some_words, with_seen, words_of_labels
from models.recipe import stage5_symbols
from models.recipe.precision import autocast, fastest
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import (
    GAINS,
    REFERENCE,
    Rates,
    caption_loss,
    complete_rates,
    random_rates,
    select_memory,
    some_captions,
)
from models.recipe.training import Training
from models.recipe.workspace import Workspace, blocks, channels_last

NAME, MAPS = "6-targets", "6-maps"
PHOTOS, SENTENCES = 64, 64  # per step
TAUGHT_WORDS = 0.4  # after this share of the steps only FEWER_SENTENCES of the sentences are left, and steps are faster
FEWER_SENTENCES = 16
CAPTIONS = 3  # of a photo per step, if it has as many
SENTENCE_WEIGHT = 0.7
MAX_NOUNS = 4  # of a sentence that stand in for labels
USUAL = 0.6  # share of the views that are complete and of the reference level
CHECKPOINT_EVERY = 300
FINE_TUNING = 0.4  # of the learning rate, for decoders that were trained before


@dataclass(frozen=True, slots=True)
class Settings:
    """Lengths of training, rates and dropout."""

    cloud_steps: int = 4400
    edge_steps: int = 1300
    cloud_learning_rate: float = 6e-4
    edge_learning_rate: float = 1.2e-3
    dropout: float = 0.2


class Target(nn.Module):
    """A tail and one decoder."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.tail, self.decoder = Tail(len(GAINS)), TextDecoder(shape)

    def features(self, maps: Tensor) -> Tensor:
        """The tail's last maps [B, 320, 7, 7] to features [B, N, 1280]."""
        features: Tensor = self.tail.features(maps)
        return features.flatten(2).transpose(1, 2)


def maps_of(maps: np.ndarray, chosen: np.ndarray | slice) -> Tensor:
    """Rows of a cache of maps, [B, 320, 7, 7], in the format of training."""
    return torch.from_numpy(np.array(maps[chosen])).permute(0, 3, 1, 2).to(fastest())


def run(work: Workspace, settings: Settings, tier: str) -> None:
    """Writes 6-targets-<tier>.pt; the edge's needs the cloud's texts of stage 8."""
    torch.manual_seed(6)
    net = new_target(work, tier)
    if (first := work / f"first-{tier}.pt").is_file():
        net.decoder.load_state_dict(torch.load(first, weights_only=True))
        settings = replace(
            settings,
            cloud_learning_rate=FINE_TUNING * settings.cloud_learning_rate,
            edge_learning_rate=FINE_TUNING * settings.edge_learning_rate,
        )
    if tier == "cloud":
        if not work.is_done(MAPS):
            cache_maps(work)
        train_cloud(work, net, settings)
    else:
        train_edge(work, net, settings)


def new_target(work: Workspace, tier: str) -> Target:
    """A target with the tail of the bottleneck's training and a new decoder."""
    net = Target(decoder_shapes(work.vocabulary)[tier])
    net.tail.load_state_dict(work.averaged("3-bottleneck", "tail."))
    for p in net.tail.parameters():
        p.requires_grad_(False)
    return channels_last(net)


def view_rates(rows: int, seed: int) -> Rates:
    """The rate of each view in the cache: most are complete and of the reference level."""
    rng = np.random.default_rng((6, seed))
    level, channels = random_rates(rows, rng)
    usual = torch.from_numpy(rng.random(rows) < USUAL)
    return Rates(level.where(~usual, REFERENCE), channels.where(~usual, LATENT[0]))


def rated_symbols(work: Workspace, codes: np.ndarray, rates: Rates) -> Tensor:
    """Codes of some views to what arrives of their symbols at these rates, float [B, 64, 7, 7]."""
    rows = np.empty(codes.shape, np.float32)
    for level in np.unique(rates.level):
        at = (rates.level == level).numpy()
        rows[at] = stage5_symbols.symbols(work, codes[at], int(level))
    return rates.cut(torch.from_numpy(rows)).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def cache_maps(work: Workspace) -> None:
    """Writes, per part, maps: the tail's last map of every view, float16 [views * photos, 7, 7, 320], and labels: the
    words of its likeliest labels, int16 [views * photos, LABEL_WORDS].
    """
    net = new_target(work, "edge")
    classifier = pretrained_lite0().classifier
    for seed, part in enumerate(("train", "unlabelled", "dev")):
        codes, seen = work.array(f"codes-{part}"), np.load(work / f"seen-{part}.npy")
        rates = complete_rates(len(codes), REFERENCE) if part == "dev" else view_rates(len(codes), seed)
        maps = work.new_array(f"maps-{part}", (len(codes), *LATENT[1:], MAP_CHANNELS), np.float16)
        words = np.zeros((len(codes), LABEL_WORDS), np.int16)
        for rows in blocks(f"maps of {part}", len(codes), 200):
            rates_of = Rates(rates.level[rows], rates.channels[rows])
            with autocast():
                last = net.tail.last_map(rated_symbols(work, codes[rows], rates_of), rates_of.level, rates_of.arrived)
                features = net.features(last)
            maps[rows] = last.permute(0, 2, 3, 1).to(torch.float16).numpy()
            words[rows] = words_seen(work, classifier(features.float().mean(1)), seen[rows])
        np.save(work / f"labels-{part}.npy", words)
    work.finish(MAPS, {part: len(work.array(f"maps-{part}")) for part in ("train", "unlabelled", "dev")})


@cache
def class_words(work: Workspace) -> list[tuple[int, ...]]:
    """The token ids of each ImageNet class's name."""
    vocabulary = (work / "vocabulary.txt").read_text().splitlines()
    return words_of_labels([known.name for known in imagenet_classes()], vocabulary)


def words_seen(work: Workspace, logits: Tensor, seen: np.ndarray) -> list[list[int]]:
    """The label words that a decoder sees, from ImageNet logits [B, 1000] and the labels that the board sends."""
    rows = [with_seen(row, stage5_symbols.labels_of(sent)) for row, sent in zip(logits.softmax(-1), seen, strict=True)]
    return [label_words(row, class_words(work), LABEL_WORDS) for row in rows]


def training_of(work: Workspace, net: Target, tier: str, total: int, learning_rate: float) -> Training:
    """Trains the decoder only."""
    weights = list(net.decoder.parameters())
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    quality = partial(evaluate, work, tier)
    return Training(work, f"{NAME}-{tier}", net, optimiser, total, CHECKPOINT_EVERY, evaluate=quality)


def train_cloud(work: Workspace, net: Target, settings: Settings) -> None:
    """Cross-entropy on people's captions, and on sentences without photos."""
    rng = np.random.default_rng(6)
    maps, labels = work.array("maps-train"), np.load(work / "labels-train.npy")
    captions, sentences = np.load(work / "captions-train.npy"), np.load(work / "sentences.npy")
    chances = sampling_chances(np.load(work / "collections-train.npy"))
    views = len(maps) // len(captions)
    is_noun = np.load(work / "nouns.npy")
    training = training_of(work, net, "cloud", settings.cloud_steps, settings.cloud_learning_rate)
    drop = Dropout(settings.dropout)
    for step in training.steps():
        photos = np.sort(rng.choice(len(captions), PHOTOS, p=chances))
        chosen = photos + len(captions) * rng.integers(0, views, PHOTOS)
        texts, of_photo = some_captions(captions[photos], CAPTIONS, rng)
        with autocast():
            features = net.features(maps_of(maps, chosen))
            memory = net.decoder.encode_image(features, some_words(labels[chosen], rng), drop)
            loss = text_loss(net.decoder, texts, select_memory(memory, of_photo), drop)
            only_text = torch.zeros(())
            if len(sentences):
                count = SENTENCES if step < TAUGHT_WORDS * settings.cloud_steps else FEWER_SENTENCES
                rows = sentences[rng.integers(0, len(sentences), count)]
                only_text = sentence_loss(net.decoder, rows, own_nouns(rows, is_noun, rng), drop)
        training.update(loss + SENTENCE_WEIGHT * only_text, caption=loss.item(), sentence=only_text.item())
    training.finish()


def text_loss(decoder: TextDecoder, texts: Tensor, memory: Memory, drop: Dropout, smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy per token of texts int64 [B, T]."""
    wanted = texts[:, 1:] != PAD  # half of a padded batch
    return caption_loss(decoder(texts[:, :-1], memory, drop, wanted), texts[:, 1:][wanted], smoothing)


def sentence_loss(decoder: TextDecoder, rows: np.ndarray, words: np.ndarray, drop: Dropout) -> Tensor:
    """Cross-entropy of sentences int16 [B, T] that have words instead of an image."""
    texts = torch.from_numpy(rows[:, : int((rows != PAD).sum(1).max())].astype(np.int64))
    image = decoder.image(torch.zeros(1, POSITIONS + 1, FEATURES)) + decoder.image_positions
    for layer in decoder.encoder:
        image = layer(image, drop)
    memory = decoder.remember(image.expand(len(texts), -1, -1), torch.from_numpy(words.astype(np.int64)), drop)
    return text_loss(decoder, texts, memory, drop)


def own_nouns(rows: np.ndarray, is_noun: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up to MAX_NOUNS of each sentence's nouns in random order, int16 [B, LABEL_WORDS], PAD at the end."""
    words = np.full((len(rows), LABEL_WORDS), PAD, np.int16)
    for row, sentence in zip(words, rows, strict=True):
        named = rng.permutation(np.unique(sentence[is_noun[sentence]]))[: rng.integers(0, MAX_NOUNS + 1)]
        row[: len(named)] = named
    return words


def sampling_chances(collections: np.ndarray) -> np.ndarray:
    """How often each photo is taken: a collection of n photos as often as n ** 0.75, so that small ones count more."""
    sizes = np.bincount(collections)
    chances = sizes[collections] ** -0.25
    shares: np.ndarray = chances / chances.sum()
    return shares


def train_edge(work: Workspace, net: Target, settings: Settings) -> None:
    """Cross-entropy on the cloud's texts about all views."""
    rng = np.random.default_rng(6)
    parts = [
        (work.array(f"maps-{part}"), np.load(work / f"labels-{part}.npy"), np.load(work / f"texts-{part}.npy"))
        for part in ("train", "unlabelled")
    ]
    training = training_of(work, net, "edge", settings.edge_steps, settings.edge_learning_rate)
    drop = Dropout(settings.dropout / 2)
    sizes = [len(texts) for _, _, texts in parts]
    for _ in training.steps():
        counts = rng.multinomial(4 * PHOTOS, np.array(sizes) / sum(sizes))
        loss = torch.zeros(())
        for (maps, labels, texts), count in zip(parts, counts, strict=True):
            if not count:
                continue
            chosen = np.sort(rng.integers(0, len(texts), count))
            rows = torch.from_numpy(texts[chosen].astype(np.int64))
            rows = rows[:, : int((rows != PAD).sum(1).max())]
            with autocast():
                words = torch.from_numpy(labels[chosen].astype(np.int64))
                memory = net.decoder.encode_image(net.features(maps_of(maps, chosen)), words, drop)
                loss = loss + text_loss(net.decoder, rows, memory, drop, 0.02) * count / counts.sum()
        training.update(loss)
    training.finish()


def evaluate(work: Workspace, tier: str, weights: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of greedy texts on dev photos, per collection; with a limit, of at most so many of each."""
    net = new_target(work, tier)
    net.load_state_dict(weights)
    maps, labels = work.array("maps-dev"), np.load(work / "labels-dev.npy")
    return cider(work, "dev", lambda rows: write(net, maps[rows], labels[rows]), limit)


@torch.inference_mode()
def write(net: Target, maps: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Greedy texts of many photos in the format of training, one token at a time: fast, for evaluation only."""
    out: list[list[int]] = []
    for at in range(0, len(maps), 250):
        rows = maps_of(maps, slice(at, at + 250))
        words = torch.from_numpy(labels[at : at + 250].astype(np.int64))
        with autocast():
            memory = net.decoder.encode_image(net.features(rows), words)
            cache = net.decoder.new_cache(len(rows), 1)
            token = torch.full((len(rows), 1), BOS)
            columns = []
            for t in range(net.decoder.shape.max_tokens):
                logits = net.decoder.step(token, torch.full((len(rows),), t), memory, cache)
                token = logits.argmax(-1)
                columns.append(token)
        tokens = torch.cat(columns, 1).tolist()
        out += [row[: row.index(EOS)] if EOS in row else row for row in tokens]
    return out
