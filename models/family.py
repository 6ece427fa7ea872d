"""The networks of the model family: Head, Density of the bottleneck, Tail, TextDecoder, DraftDecoder.

One head on the board, one latent on the wire, several targets on the servers. This file knows nothing about training
schedules, bitstreams, batching and files.

Shapes used throughout: B batch, C = 64 latent channels, G = 4 groups of them, N = 49 positions (7 x 7), L levels,
D width, T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.inference.bundle import BOS, PAD, UNKNOWN
from models.backbone import BLOCKS, CUT, CUT_CHANNELS, FEATURES, MAP_CHANNELS, Block, Conv, normalise

LATENT = (64, 7, 7)  # channels, height, width
POSITIONS = LATENT[1] * LATENT[2]
GROUPS = 4  # nested groups of channels, the most important first
LABEL_WORDS = 12
NEVER_EMITTED = (PAD, BOS, UNKNOWN)  # a decoder can score them, but no text contains them


class Head(nn.Module):
    """The board's part: blocks 0..10 of the backbone and the bottleneck convolution.

    The latent is in units of symbols: rounding it half to even gives the symbols that are coded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, stride=2)
        self.blocks = nn.Sequential(*(Block(shape) for shape in BLOCKS[:CUT]))
        self.bottleneck = Conv(CUT_CHANNELS, LATENT[0], 3, stride=2, linear=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 RGB [B, 224, 224, 3] to the latent, float [B, 64, 7, 7]."""
        latent: Tensor = self.bottleneck(self.blocks(self.stem(normalise(pixels, self.stem.weight.dtype))))
        return latent


class Density(nn.Module):
    """The bottleneck's prior q(z): per channel a mixture of three logistics, integrated over the bins of a symbol.

    Training minimises -log2 q of the symbols, an upper bound on I(X; Z) (Ballé et al., arXiv 1611.01704; Alemi et al.,
    deep variational information bottleneck, arXiv 1612.00410). One density of the latent serves all levels, since a
    level only changes the width of the bins. It is not used after training: the shipped tables are counted.
    """

    def __init__(self, channels: int = LATENT[0], components: int = 3) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels, components))
        self.means = nn.Parameter(torch.linspace(-0.5, 0.5, components).repeat(channels, 1))
        self.log_scales = nn.Parameter(torch.linspace(-1.0, 1.0, components).repeat(channels, 1))

    def bits(self, symbols: Tensor, gains: Tensor) -> Tensor:
        """Symbols, float [B, C, H, W], and the gain of each row's level, float [B], to bits per symbol [B, C, H, W]."""
        x, gain = symbols.float()[..., None], gains[:, None, None, None, None]
        means, logits = self.means[:, None, None], self.logits[:, None, None]
        scales = self.log_scales[:, None, None].exp()
        upper = torch.sigmoid(((x + 0.5) / gain - means) / scales)
        lower = torch.sigmoid(((x - 0.5) / gain - means) / scales)
        mass = ((upper - lower) * logits.softmax(-1)).sum(-1)
        return -torch.log2(mass.clamp_min(2.0**-16))


class MatrixConv(Conv):
    """A 3 x 3 convolution of stride 1 as one matrix product.

    Libraries choose a 3 x 3 algorithm by batch size. The algorithm decides the order of sums, so a row's bits would
    depend on the number of rows. Matrix products were measured to give the same bits in every batch.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.product: nn.Module | None = None  # with packed weights, on a server; None: the plain product

    @property
    def matrix(self) -> Tensor:
        """The weights [C', 9 C]: a view if their memory is channels last, as on a server."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Float [B, C, H, W] to float [B, C', H, W]. scale and shift, [B, C'], change each row before the ReLU6."""
        H, W = x.shape[2:]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = torch.cat([padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], -1)
        y = self.product(windows) if self.product else F.linear(windows, self.matrix, self.bias)
        if scale is not None and shift is not None:
            y = y * scale[:, None, None] + shift[:, None, None]
        return F.relu6(y).permute(0, 3, 1, 2)


class Tail(nn.Module):
    """The server's part of the image network: symbols back to the backbone's last map and 1280 features.

    The expander reconstructs the map at the cut from the symbols: a linear layer plus a small network. The backbone's
    remaining blocks, fine-tuned, follow. With several levels, the expander is told each row's level and how much of
    each group has arrived: `steps` turns symbols into latent units, and the hidden layers are scaled and shifted before
    their ReLU6 (feature-wise linear modulation: Perez et al., arXiv 1709.07871).
    """

    def __init__(self, levels: int = 1, width: int = 256) -> None:
        super().__init__()
        self.linear = Conv(LATENT[0], 4 * CUT_CHANNELS, 1, linear=True)
        self.expand = nn.Sequential(
            MatrixConv(LATENT[0], width), MatrixConv(width, width), Conv(width, 4 * CUT_CHANNELS, 1, linear=True)
        )
        self.blocks = nn.Sequential(*(Block(shape) for shape in BLOCKS[CUT:]))
        self.features = Conv(MAP_CHANNELS, FEATURES, 1)
        self.levels = levels
        if levels > 1:
            self.steps = nn.Parameter(torch.ones(levels, LATENT[0]))
            self.of_level = nn.Parameter(torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None].repeat(levels, 1, width))
            self.of_groups = nn.Parameter(torch.zeros(GROUPS, 4, width))

    def last_map(self, symbols: Tensor, level: Tensor | None = None, arrived: Tensor | None = None) -> Tensor:
        """Symbols, float [B, 64, 7, 7], to the backbone's last map, float [B, 320, 7, 7]. See `cut`."""
        last: Tensor = self.blocks(self.cut(symbols, level, arrived))
        return last

    def cut(self, symbols: Tensor, level: Tensor | None = None, arrived: Tensor | None = None) -> Tensor:
        """Symbols, float [B, 64, 7, 7], to the reconstructed map at the cut, float [B, 112, 14, 14].

        level: int64 [B]; arrived: the share of each group's channels that is there, float [B, G]. The others are zero.
        By default all rows are complete and of the finest level.
        """
        if self.levels == 1:
            return F.pixel_shuffle(self.linear(symbols) + self.expand(symbols), 2)
        if level is None:
            level = torch.full((len(symbols),), self.levels - 1, device=symbols.device)
        if arrived is None:
            arrived = symbols.new_ones(len(symbols), GROUPS)
        latent = symbols * self.steps[level][..., None, None].to(symbols.dtype)
        # Sums in a fixed order and not a matrix product, so that a row's bits do not depend on the batch.
        told = self.of_level[level]
        for group in range(GROUPS):
            told = told + arrived[:, group, None, None] * self.of_groups[group]
        scale1, shift1, scale2, shift2 = told.to(symbols.dtype).unbind(1)
        first, second, last = self.expand
        hidden = second(first(latent, scale1, shift1), scale2, shift2)
        return F.pixel_shuffle(self.linear(latent) + last(hidden), 2)

    def forward(self, symbols: Tensor, level: Tensor | None = None, arrived: Tensor | None = None) -> Tensor:
        """Symbols, float [B, 64, 7, 7], to features, float [B, N, 1280], >= 0. See `cut`."""
        features: Tensor = self.features(self.last_map(symbols, level, arrived))
        return features.flatten(2).transpose(1, 2)


def arrived_groups(channels: Tensor) -> Tensor:
    """How many of the 64 channels are there, int64 [B], to the share of each group, float [B, G]."""
    size = LATENT[0] // GROUPS
    starts = torch.arange(GROUPS, device=channels.device) * size
    return ((channels[:, None] - starts) / size).clamp(0.0, 1.0)


class Classifier(nn.Module):
    """Labels from the pooled features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, N, 1280] to logits [B, classes]."""
        logits: Tensor = self.linear(features.mean(1))
        return logits


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a TextDecoder; they are in the bundle's manifest."""

    vocabulary: int
    width: int = 256
    heads: int = 4
    encoder_layers: int = 1
    decoder_layers: int = 3
    max_tokens: int = 24  # of a text, its end token included
    label_words: int = 0  # words of the likeliest labels that it sees besides the features


def decoder_shapes(vocabulary: int) -> dict[str, DecoderShape]:
    """The decoder of each tier."""
    return {
        "cloud": DecoderShape(vocabulary, width=256, encoder_layers=1, decoder_layers=3, label_words=LABEL_WORDS),
        "edge": DecoderShape(vocabulary, width=160, encoder_layers=0, decoder_layers=1, label_words=LABEL_WORDS),
    }


class Attention(nn.Module):
    """Multi-head attention in its explicit form: matmul, softmax, matmul.

    In fused kernels the order of sums depends on the length of the buffers, so a token's bits would depend on the other
    tokens of the pass. The explicit form does not have this problem, which makes speculation exact in floating point.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, heads, T, D / heads]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of x [B, T, D], each [B, heads, T, D / heads]."""
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D]; keys, values [B, heads, S, D / heads]; mask [B or 1, 1, T, S], 0 or -inf; to [B, T, D]."""
        query = self.split(self.query(x))
        scores = query @ keys.transpose(-1, -2) * (1.0 / math.sqrt(query.shape[-1]))
        if mask is not None:
            scores = scores + mask
        attended: Tensor = self.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderLayer(nn.Module):
    """Self-attention over positions, pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)

    def forward(self, x: Tensor, drop: "Dropout") -> Tensor:
        """[B, N, D] to [B, N, D]."""
        y = self.norm1(x)
        x = x + drop(self.attention(y, *self.attention.keys_values(y)))
        return x + drop(self.feed_forward(self.norm2(x)))


class DecoderLayer(nn.Module):
    """Self-attention over the text, attention over the image, feed-forward; pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention, self.image_attention = Attention(width, heads), Attention(width, heads)
        self.feed_forward = FeedForward(width)


class Dropout:
    """Dropout during training, the identity otherwise. It is passed as an argument, not a module in every layer.

    Masks are windows at random positions of one pool: on a CPU, new random numbers take longer than their use.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self._pool = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.rate == 0.0:
            return x
        if len(self._pool) < 2 * x.numel() or self._pool.dtype != x.dtype:
            kept = torch.rand(4 * x.numel(), device=x.device) >= self.rate
            self._pool = kept.to(x.dtype) / (1.0 - self.rate)
        start = int(torch.randint(len(self._pool) - x.numel(), ()))
        return x * self._pool[start : start + x.numel()].view(x.shape)


@dataclass(slots=True)
class Cache:
    """Static key/value buffers of a batch: one pair [B, heads, capacity, D / heads] per decoder layer.

    A row is visible if its index is at most the query's position. To roll back, the caller just does not advance the
    start: stale rows are overwritten before they become visible. Rows must be finite, so they start as zeros.
    """

    keys: list[Tensor]
    values: list[Tensor]


# Per decoder layer, keys and values of the image, its mean and the label words, [B, heads, N + 1 + words, D / heads].
Memory = list[tuple[Tensor, Tensor]]


class TextDecoder(nn.Module):
    """A transformer decoder that writes a caption from the features (Vaswani et al., arXiv 1706.03762).

    It also sees the words of the likeliest labels. They name things that no captioned photo has taught, and they let it
    learn from sentences without photos, whose own nouns stand in for labels.

    Input and output embeddings are shared. `forward` is for training; `step` is for serving, over a static cache.
    """

    never_emitted: Tensor

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        D = shape.width
        self.image = nn.Linear(FEATURES, D)
        self.image_positions = nn.Parameter(torch.randn(POSITIONS + 1, D) * 0.02)
        self.encoder = nn.ModuleList(EncoderLayer(D, shape.heads) for _ in range(shape.encoder_layers))
        if shape.label_words:
            self.label_positions = nn.Parameter(torch.randn(shape.label_words, D) * 0.02)
        self.image_norm = nn.LayerNorm(D)
        self.tokens = nn.Embedding(shape.vocabulary, D)
        self.positions = nn.Parameter(torch.randn(shape.max_tokens, D) * 0.02)
        self.layers = nn.ModuleList(DecoderLayer(D, shape.heads) for _ in range(shape.decoder_layers))
        self.norm = nn.LayerNorm(D)
        nn.init.normal_(self.tokens.weight, std=0.02)
        banned = torch.zeros(shape.vocabulary)
        banned[list(NEVER_EMITTED)] = -math.inf
        self.register_buffer("never_emitted", banned, persistent=False)
        self.scores: nn.Module | None = None  # `choose` with packed weights, on a server; None: the plain product

    def encode_image(self, features: Tensor, labels: Tensor | None = None, drop: Dropout | None = None) -> Memory:
        """Features [B, N, 1280] and words of labels, int64 [B, label_words], PAD where there are none, to the memory.

        Zeros as features mean that there is no image.
        """
        drop = drop or Dropout()
        x = self.image(torch.cat([features, features.mean(1, keepdim=True)], 1)) + self.image_positions
        x = drop(x)
        for layer in self.encoder:
            x = layer(x, drop)
        return self.remember(x, labels, drop)

    def remember(self, image: Tensor, labels: Tensor | None = None, drop: Dropout | None = None) -> Memory:
        """The encoded image [B, N + 1, D] and words of labels to the keys and values of each decoder layer."""
        if words := self.shape.label_words:
            if labels is None:
                labels = torch.full((len(image), words), PAD, device=image.device)
            seen = self.tokens(labels) + self.label_positions
            image = torch.cat([image, (drop or Dropout())(seen).to(image.dtype)], 1)
        x = self.image_norm(image)
        return [layer.image_attention.keys_values(x) for layer in self.layers]  # type: ignore[union-attr, operator]

    def forward(
        self, tokens: Tensor, memory: Memory, drop: Dropout | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing: tokens int64 [B, T] from BOS on, to logits [B, T, V] of what follows each.

        With `wanted`, a mask [B, T], only the logits of those positions, [wanted.sum(), V].
        """
        T = tokens.shape[1]
        mask = torch.full((T, T), -math.inf, device=tokens.device).triu(1)[None, None]
        x = self.tokens(tokens) + self.positions[:T]
        x = self._layers(x, memory, mask, None, None, drop or Dropout())
        return F.linear(self.norm(x if wanted is None else x[wanted]), self.tokens.weight)

    def new_cache(self, batch: int, block: int) -> Cache:
        """Empty buffers for `batch` texts written in blocks of `block` tokens."""
        shape = self.shape
        # Padding tokens of a block write rows too. With room for a whole block after the longest text, they cannot
        # overwrite a real row.
        size = (batch, shape.heads, shape.max_tokens + block, shape.width // shape.heads)
        weight = self.tokens.weight
        zeros = [[weight.new_zeros(size) for _ in self.layers] for _ in range(2)]
        return Cache(*zeros)

    def step(self, tokens: Tensor, start: Tensor, memory: Memory, cache: Cache) -> Tensor:
        """`read` and `choose` in one: a block of tokens int64 [B, W] to logits [B, W, V]."""
        return self.choose(self.read(tokens, start, memory, cache))

    def choose(self, hidden: Tensor) -> Tensor:
        """Hidden states of `read`, float [..., D], to logits of the next token [..., V]."""
        if self.scores:
            scores: Tensor = self.scores(hidden)
            return scores
        return F.linear(hidden, self.tokens.weight) + self.never_emitted

    def read(self, tokens: Tensor, start: Tensor, memory: Memory, cache: Cache) -> Tensor:
        """One block: tokens int64 [B, W], row b at positions start[b]..start[b] + W - 1, to hidden states [B, W, D].

        Writes the block's keys and values into `cache`. Key j is visible to position i if j <= i.
        """
        positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        capacity = cache.keys[0].shape[2]
        later = torch.arange(capacity, device=tokens.device) > positions[..., None]
        mask = torch.zeros(later.shape, dtype=self.positions.dtype, device=tokens.device)
        mask = mask.masked_fill_(later, -math.inf)[:, None]
        x = self.tokens(tokens) + self.positions[positions.clamp_max(self.shape.max_tokens - 1)]
        hidden: Tensor = self.norm(self._layers(x, memory, mask, cache, positions, Dropout()))
        return hidden

    def _layers(
        self, x: Tensor, memory: Memory, mask: Tensor, cache: Cache | None, positions: Tensor | None, drop: Dropout
    ) -> Tensor:
        x = drop(x)
        for i, (layer, image) in enumerate(zip(self.layers, memory, strict=True)):
            assert isinstance(layer, DecoderLayer)
            y = layer.norm1(x)
            keys, values = layer.self_attention.keys_values(y)
            if cache is not None and positions is not None:
                rows = torch.arange(len(x), device=x.device)[:, None]
                cache.keys[i][rows, :, positions] = keys.transpose(1, 2).to(cache.keys[i].dtype)
                cache.values[i][rows, :, positions] = values.transpose(1, 2).to(cache.values[i].dtype)
                keys, values = cache.keys[i], cache.values[i]
            x = x + drop(layer.self_attention(y, keys, values, mask))
            x = x + drop(layer.image_attention(layer.norm2(x), *image))
            x = x + drop(layer.feed_forward(layer.norm3(x)))
        return x


DRAFT_EMBEDDING, DRAFT_STATE, DRAFT_MEMORY = 128, 256, 128


def gru_step(x: Tensor, h: Tensor, state: Tensor) -> Tensor:
    """The next state [..., D] of a gated recurrent unit (Cho et al., arXiv 1406.1078).

    x and h [..., 3 D] are the gates' inputs from the token and from the state: reset, update, new. Not nn.GRUCell:
    that computes x itself, and the lookahead reads it from a table (models/lookahead.py).
    """
    x_reset, x_update, x_new = x.chunk(3, -1)
    h_reset, h_update, h_new = h.chunk(3, -1)
    update = torch.sigmoid(x_update + h_update)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    return new + update * (state - new)


class DraftDecoder(nn.Module):
    """The board's text decoder: a gated recurrent unit (Cho et al., arXiv 1406.1078) with attention to the latent.

    It has about a million parameters: of a large vocabulary it knows the first words, which are the most frequent. Its
    first state tells it the labels that the board has seen, if there are any. `encode_image` and `first_state` run once
    per frame, then `step` once per token.
    """

    never_emitted: Tensor

    def __init__(self, vocabulary: int, classes: int = 0) -> None:
        """classes: of the labels that it knows; 0: it knows none."""
        super().__init__()
        self.image_conv = nn.Conv2d(LATENT[0], DRAFT_MEMORY, 3, padding=1)
        self.image_positions = nn.Parameter(torch.zeros(DRAFT_MEMORY, *LATENT[1:]))
        self.tokens = nn.Embedding(vocabulary, DRAFT_EMBEDDING)
        self.query = nn.Linear(DRAFT_STATE, DRAFT_MEMORY)
        self.input_gates = nn.Linear(DRAFT_EMBEDDING + DRAFT_MEMORY, 3 * DRAFT_STATE)
        self.state_gates = nn.Linear(DRAFT_STATE, 3 * DRAFT_STATE)
        self.out = nn.Linear(DRAFT_STATE + DRAFT_MEMORY, DRAFT_EMBEDDING)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.labels = nn.Embedding(classes, DRAFT_STATE)
        nn.init.normal_(self.labels.weight, std=0.3)
        nn.init.normal_(self.tokens.weight, std=0.1)
        banned = torch.zeros(vocabulary)
        banned[list(NEVER_EMITTED)] = -1e4  # finite, so that it can be part of the bias in the 8-bit export
        self.register_buffer("never_emitted", banned, persistent=False)

    def encode_image(self, symbols: Tensor) -> Tensor:
        """Symbols, float [B, 64, 7, 7], to the memory, float [B, N, 128]."""
        memory = F.relu(self.image_conv(symbols) + self.image_positions)
        return memory.flatten(2).transpose(1, 2)

    def first_state(self, classes: Tensor, probabilities: Tensor) -> Tensor:
        """Labels, class int64 and probability float, each [B, K], to the state before the first token, [B, 256].

        A label that is missing has the probability 0. Without labels, the state is zero.
        """
        state: Tensor = (self.labels(classes) * probabilities[..., None]).sum(1)
        return state

    def step(self, token: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """token int64 [B], state [B, 256], memory [B, N, 128], to (logits [B, V], next state [B, 256])."""
        hidden, state = self.read(token, state, memory)
        return self.choose(hidden), state

    def choose(self, hidden: Tensor) -> Tensor:
        """Hidden [..., 128] to the logits of the next token [..., V]."""
        return F.linear(hidden, self.tokens.weight, self.bias + self.never_emitted)

    def read(self, token: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, but to (hidden [B, 128], next state)."""
        scores = memory @ self.query(state)[:, :, None] * (1.0 / math.sqrt(DRAFT_MEMORY))  # [B, N, 1]
        seen = (scores.softmax(1) * memory).sum(1)
        x = self.input_gates(torch.cat([self.tokens(token), seen], -1))
        h = self.state_gates(state)
        state = gru_step(x, h, state)
        hidden: Tensor = self.out(torch.cat([state, seen], -1))
        return hidden, state

    def forward(self, tokens: Tensor, memory: Tensor, state: Tensor, wanted: Tensor, dropout: float = 0.0) -> Tensor:
        """Teacher forcing: tokens int64 [B, T] from BOS on, from the first state on. To the logits of what follows each
        token where `wanted`, a mask [B, T], says so: [wanted.sum(), V].
        """
        drop, out = Dropout(dropout), []
        for t in range(tokens.shape[1]):
            hidden, state = self.read(tokens[:, t], state, drop(memory))
            out.append(hidden)
        return self.choose(torch.stack(out, 1)[wanted])
