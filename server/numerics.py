"""The start test: which shapes give the same bits on this device, with these weights and this thread count.

Which kernel a library picks, and with it the order of its sums, depends on shape, CPU and thread count, and no library
promises otherwise; so it is tried, at every start. What is proven here is all that the engine then does.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from edge_runtime.bundle import BOS, UNKNOWN
from models.family import LATENT, Memory, TextDecoder
from server.engine import BLOCK, SIZES, Engine, Proof, look

GARBAGE = 1e3  # left in a cache by earlier passes: finite, and far from what belongs there
REJECTED = UNKNOWN + 1  # a token that follows the real ones of a block
MAX_TEXT = 48  # tokens of a test text; shapes do not change along it
CUTS = (1, 3, 5, 8, 2, 13, BLOCK)  # tokens of successive passes; each row begins elsewhere in this round


@torch.inference_mode()
def prove(engine: Engine, sizes: Sequence[int] = SIZES) -> Proof:
    """Runs random latents and texts in every shape; what has the bits of one row alone, one token a pass, is proven.

    Varied are the batch size, a row's slot, its neighbours, how its text is cut into blocks, what follows the real
    tokens in a block, and what is left in the cache. Takes about a second a target on a CPU.
    """
    random = torch.Generator().manual_seed(0)
    symbols = torch.randint(-4, 5, (max(sizes), *LATENT), generator=random).float().to(engine.device)
    features = engine.features(symbols, (1,))
    tail_sizes = _equal_sizes(sizes, features, lambda rows, size: engine.features(symbols[rows], (size,)))
    fingerprint = hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()} {features.dtype}".encode())
    fingerprint.update(features.cpu().numpy().tobytes())
    look_sizes, pass_sizes = tuple(sizes), tuple(sizes)
    for decoder in engine.decoders.values():
        memory = look(decoder, features, (1,))
        look_sizes = _equal_sizes(look_sizes, _flat(memory), partial(_look_again, decoder, features))
        length = min(decoder.shape.max_tokens, MAX_TEXT)
        texts = torch.randint(UNKNOWN + 1, decoder.shape.vocabulary, (len(symbols), length), generator=random)
        texts[:, 0] = BOS
        alone = read(decoder, memory, texts, size=1, cuts=(1,))
        pass_sizes = _equal_sizes(pass_sizes, alone, partial(_read_again, decoder, memory, texts))
        fingerprint.update(alone.cpu().numpy().tobytes())
    may_speculate = 1 in pass_sizes
    return Proof(
        tail_sizes=tail_sizes or (1,),
        look_sizes=look_sizes or (1,),
        pass_sizes=pass_sizes if may_speculate else (1,),
        may_speculate=may_speculate,
        numerics=fingerprint.hexdigest()[:8],
    )


def read(
    decoder: TextDecoder,
    memory: Memory,
    texts: Tensor,
    size: int,
    cuts: Sequence[int],
    block: int = BLOCK,
    filler: int = BOS,
    left: float = 0.0,
) -> Tensor:
    """Passes over given texts, int64 [R, T] from BOS on, in batches of `size` rows and blocks of `cuts` tokens.

    Returns what the engine looks at, [R, T, V + 1]: the logits of what follows each token, and their log-sum-exp.
    `filler` fills the blocks up, `left` is what the cache holds at first.
    """
    out = texts.new_zeros((*texts.shape, decoder.shape.vocabulary + 1), dtype=torch.float32)
    for rows in torch.split(torch.arange(len(texts)), size):
        seen = _rows(memory, rows)
        cache = decoder.new_cache(size, block)
        for buffer in (*cache.keys, *cache.values):
            buffer.fill_(left)
        at = [0] * size
        for turn in count():
            pieces = [texts[row, at[b] : at[b] + cuts[(b + turn) % len(cuts)]] for b, row in enumerate(rows)]
            if not any(len(piece) for piece in pieces):
                break
            tokens = torch.full((size, block), filler)
            for b, piece in enumerate(pieces):
                tokens[b, : len(piece)] = piece
            device = seen[0][0].device
            logits = decoder.step(tokens.to(device), torch.tensor(at, device=device), seen, cache)
            looked_at = torch.cat([logits, logits.logsumexp(-1, keepdim=True)], -1).to(out.device)
            for b, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
                out[row, at[b] : at[b] + len(piece)] = looked_at[b, : len(piece)]
                at[b] += len(piece)
    return out


def _equal_sizes(sizes: Sequence[int], alone: Tensor, again: Callable[[list[int], int], Tensor]) -> tuple[int, ...]:
    """The sizes at which `again(rows, size)` has the bits of `alone` [R, ...], whichever slots the rows are in."""

    def is_equal(size: int) -> bool:
        R = len(alone)
        orders = [[(row + shift) % R for row in range(R)] for shift in {0, 1, size // 2}]
        return all(torch.equal(again(rows, size), alone[rows]) for rows in orders)

    return tuple(size for size in sizes if is_equal(size))


def _look_again(decoder: TextDecoder, features: Tensor, rows: list[int], size: int) -> Tensor:
    return _flat(look(decoder, features[rows], (size,)))


def _read_again(decoder: TextDecoder, memory: Memory, texts: Tensor, rows: list[int], size: int) -> Tensor:
    return read(decoder, _rows(memory, rows), texts[rows], size, CUTS, filler=REJECTED, left=GARBAGE)


def _flat(memory: Memory) -> Tensor:
    return torch.cat([buffer.flatten(1) for pair in memory for buffer in pair], 1)


def _rows(memory: Memory, rows: Sequence[int] | Tensor) -> Memory:
    return [(keys[rows], values[rows]) for keys, values in memory]
