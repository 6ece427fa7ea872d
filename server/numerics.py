"""The start test: which shapes give the same bits on this device, with these weights and this thread count.

Which kernel a library picks, and with it the order of its sums, depends on shape, CPU and thread count, and no library
promises anything else. So every start tries it, and the engine then uses only what was proven here.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, product
from typing import TypeVar

import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, UNKNOWN
from models.family import LATENT, Memory, TextDecoder
from server.engine import BLOCK, SIZES, WIDTHS, Engine, Job, Proof, Shape, encode_image

Option = TypeVar("Option", int, Shape)

GARBAGE = 1e3  # left in a cache by earlier passes: finite, and far from what belongs there
REJECTED = UNKNOWN + 1  # a token after the real ones of a block
MAX_TEXT = 48  # tokens of a test text; shapes do not change along it
CUTS = (1, 3, 5, 8, 2, 13, BLOCK)  # tokens of successive passes; each row begins at another one


@torch.inference_mode()
def prove(engine: Engine, sizes: Sequence[int] = SIZES) -> Proof:
    """Runs random latents and texts in every shape. Proven is what has the bits of one row alone, one token per pass.

    It varies the batch size, the width, a row's place, its neighbours, how its text is cut into blocks, what follows
    the real tokens in a block, and what is left in the cache. Takes about a second per target on a CPU.
    """
    random = torch.Generator().manual_seed(0)
    symbols = torch.randint(-4, 5, (max(sizes), *LATENT), generator=random).to(torch.int8).numpy()
    jobs = [Job(each, level=row % engine.tail.levels) for row, each in enumerate(symbols)]
    features = engine.features(jobs, (1,))
    tail_sizes = _equal(sizes, features, lambda rows, size: engine.features([jobs[row] for row in rows], (size,)))
    fingerprint = hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()} {features.dtype}".encode())
    fingerprint.update(features.cpu().numpy().tobytes())
    image_sizes, shapes = tuple(sizes), tuple(product(sizes, WIDTHS))
    for decoder in engine.decoders.values():
        memory = encode_image(decoder, features, (1,))
        image_sizes = _equal(image_sizes, _flat(memory), partial(_encode_again, decoder, features))
        length = min(decoder.shape.max_tokens, MAX_TEXT)
        texts = torch.randint(UNKNOWN + 1, decoder.shape.vocabulary, (len(symbols), length), generator=random)
        texts[:, 0] = BOS
        alone = read(decoder, memory, texts, (1, BLOCK), cuts=(1,))
        shapes = _equal(shapes, alone, partial(_read_again, decoder, memory, texts))
        fingerprint.update(alone.cpu().numpy().tobytes())
    may_speculate = (1, BLOCK) in shapes
    return Proof(
        tail_sizes=tail_sizes or (1,),
        image_sizes=image_sizes or (1,),
        shapes=shapes if may_speculate else ((1, BLOCK),),
        may_speculate=may_speculate,
        numerics=fingerprint.hexdigest()[:8],
    )


def read(
    decoder: TextDecoder,
    memory: Memory,
    texts: Tensor,
    shape: Shape,
    cuts: Sequence[int],
    filler: int = BOS,
    left: float = 0.0,
) -> Tensor:
    """Passes of this shape over given texts, int64 [R, T] from BOS on, that read `cuts` tokens at a time.

    Returns what the engine uses and keeps per token, [R, T, ...]: the logits of the next token, their log-sum-exp, and
    its keys and values. `filler` fills the blocks up, and `left` is what the cache holds at first.
    """
    size, width = shape
    T = texts.shape[1]
    found = texts.new_zeros((*texts.shape, decoder.shape.vocabulary + 1), dtype=torch.float32)
    kept = []
    for rows in torch.split(torch.arange(len(texts)), size):
        seen = _rows(memory, rows)
        cache = decoder.new_cache(size, BLOCK)
        for buffer in (*cache.keys, *cache.values):
            buffer.fill_(left)
        at = [0] * size
        for turn in count():
            pieces = [texts[row, at[b] : at[b] + cuts[(b + turn) % len(cuts)]] for b, row in enumerate(rows)]
            if not any(len(piece) for piece in pieces):
                break
            tokens = torch.full((size, width), filler)
            for b, piece in enumerate(pieces):
                tokens[b, : len(piece)] = piece
            device = seen[0][0].device
            logits = decoder.step(tokens.to(device), torch.tensor(at, device=device), seen, cache)
            used = torch.cat([logits, logits.logsumexp(-1, keepdim=True)], -1).to(found.device)
            for b, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
                found[row, at[b] : at[b] + len(piece)] = used[b, : len(piece)]
                at[b] += len(piece)
        buffers = [buffer[:, :, :T].transpose(1, 2).flatten(2) for buffer in (*cache.keys, *cache.values)]
        kept.append(torch.cat(buffers, -1).to(found.device))
    return torch.cat([found, torch.cat(kept)], -1)


def _equal(
    options: Sequence[Option], alone: Tensor, again: Callable[[list[int], Option], Tensor]
) -> tuple[Option, ...]:
    """The sizes or shapes with which `again(rows, option)` has the bits of `alone` [R, ...], at any places."""
    orders = [[(row + shift) % len(alone) for row in range(len(alone))] for shift in (0, 3)]

    def is_equal(option: Option) -> bool:
        size = option if isinstance(option, int) else option[0]
        # A row without neighbours has one place: the second order would repeat the first.
        return all(torch.equal(again(rows, option), alone[rows]) for rows in orders[:size])

    return tuple(option for option in options if is_equal(option))


def _encode_again(decoder: TextDecoder, features: Tensor, rows: list[int], size: int) -> Tensor:
    return _flat(encode_image(decoder, features[rows], (size,)))


def _read_again(decoder: TextDecoder, memory: Memory, texts: Tensor, rows: list[int], shape: Shape) -> Tensor:
    cuts = [min(cut, shape[1]) for cut in CUTS]
    return read(decoder, _rows(memory, rows), texts[rows], shape, cuts, filler=REJECTED, left=GARBAGE)


def _flat(memory: Memory) -> Tensor:
    return torch.cat([buffer.flatten(1) for pair in memory for buffer in pair], 1)


def _rows(memory: Memory, rows: Sequence[int] | Tensor) -> Memory:
    return [(keys[rows], values[rows]) for keys, values in memory]
