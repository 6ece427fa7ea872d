"""The noise of sampled texts: golden vectors, a second implementation, and the law that it must have."""

import hashlib
import math

import numpy as np
import pytest

from edge_runtime.inference import noise
from edge_runtime.inference.noise import exp, gumbel, log, philox

SEED = 0x0123456789ABCDEF
EULER = 0.5772156649015329  # mean of a standard Gumbel variable; its variance is pi^2 / 6


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123 for philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_has_its_authors_known_answers(counter, key, words) -> None:
    found = philox((np.array(counter[:1], np.uint64), *counter[1:]), key)
    assert " ".join(f"{word:08x}" for word in found[:, 0].tolist()) == words


def test_the_noise_has_its_golden_vectors() -> None:
    ends = np.array([0, 1, 1 << 31, (1 << 32) - 1], np.uint64)  # the words with the least and the most noise
    u = (2 * ends + np.uint64(1)).astype(np.float64) * 2.0**-33
    assert [value.hex() for value in (-log(-log(u))).tolist()] == [
        *("-0x1.90a3aa15a0b5dp+1", "-0x1.8a56cb66869f4p+1", "0x1.774f29c39c0bdp-2", "0x1.6dfb516f1cbbfp+4"),
    ]
    assert [value.hex() for value in gumbel(SEED, 7, np.arange(5)).tolist()] == [
        *("0x1.d0a72614130cep-6", "-0x1.3ba46fdd61faep-1", "-0x1.b2bb035ad8a41p-2", "-0x1.18f07dfd5e16ep+0"),
        "-0x1.073e04e99125ap-2",
    ]


def test_many_values_have_the_bits_that_they_had_on_other_machines() -> None:
    """NumPy chooses other instructions by CPU and by length."""
    values = np.concatenate([gumbel(seed, 3, np.arange(size)) for seed, size in enumerate((1, 7, 1000, 50_000))])
    assert hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()[:16] == "9d3a65324e413b9d"
    weights = exp(-np.arange(100_000) * 0.00731)
    assert hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()[:16] == "b3f92b106e83bec5"


def plain_log(x: float) -> float:
    """docs/protocol.md, section 13, word for word, on Python's own floats."""
    m, e = math.frexp(x)
    if m < float.fromhex("0x1.6a09e667f3bcdp-1"):
        m, e = 2 * m, e - 1
    s = (m - 1) / (m + 1)
    z, h = s * s, 1 / 21
    for divisor in (19, 17, 15, 13, 11, 9, 7, 5, 3, 1):
        h = h * z
        h = h + 1 / divisor
    low = e * float.fromhex("0x1.473de6af278edp-34") + 2 * (s * h)
    return e * float.fromhex("0x1.62e42fefp-1") + low


def plain_gumbel(seed: int, position: int, token: int) -> float:
    x = [token >> 2, position, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return -plain_log(-plain_log((2 * x[token & 3] + 1) * 2.0**-33))


def test_a_second_implementation_has_the_same_bits() -> None:
    for seed, position in ((0, 0), (SEED, 7), ((1 << 64) - 1, 1023)):
        tokens = [0, 1, 2, 3, 4, 5, 1000, (1 << 20) - 1]
        assert gumbel(seed, position, np.array(tokens)).tolist() == [plain_gumbel(seed, position, t) for t in tokens]


def test_a_tokens_noise_does_not_depend_on_which_tokens_are_asked_for() -> None:
    whole = gumbel(SEED, 5, np.arange(300))
    for size in range(1, 20):
        tokens = np.random.default_rng(size).choice(300, size, replace=False)
        assert np.array_equal(gumbel(SEED, 5, tokens), whole[tokens])
    assert gumbel(SEED, 5, np.array([], np.int64)).size == 0


def test_logarithm_and_exponential_are_close_to_the_exact_ones() -> None:
    x = np.random.default_rng(0).random(10_000)
    assert np.abs(log(x) - np.log(x)).max() < 4e-15
    y = -700 * x
    assert np.abs(exp(y) / np.exp(y) - 1).max() < 1e-15
    assert exp(np.array([0.0, -np.inf])).tolist() == [1.0, pytest.approx(0, abs=1e-300)]


def statistic(counts: np.ndarray, expected: np.ndarray) -> float:
    """How far Pearson's chi-square is above its mean, in its standard deviations."""
    freedom = counts.size - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return float((chi_square - freedom) / math.sqrt(2 * freedom))


def of_shares(values: np.ndarray, cells: int = 100) -> float:
    """The same for the shares exp(-exp(-noise)), which are uniform."""
    counts, _ = np.histogram(np.exp(-np.exp(-values)), cells, (0, 1))
    return statistic(counts, np.full(cells, values.size / cells))


def test_a_million_values_have_the_law_of_gumbel() -> None:
    values = np.concatenate([gumbel(seed, seed, np.arange(10_000)) for seed in range(100)])
    assert values.mean() == pytest.approx(EULER, abs=0.005)
    assert values.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert abs(of_shares(values)) < 4


@pytest.mark.parametrize("other", ["position", "token", "seed"])
def test_noise_is_independent_across_positions_tokens_and_seeds(other: str) -> None:
    """If two values are independent and uniform, so is their sum modulo 1."""
    tokens = np.arange(50_000)
    first = gumbel(SEED, 0, tokens)
    second = {
        "position": gumbel(SEED, 1, tokens),
        "token": gumbel(SEED, 0, tokens + 1),
        "seed": gumbel(SEED + 1, 0, tokens),
    }[other]
    pairs, _, _ = np.histogram2d(*(np.exp(-np.exp(-x)) for x in (first, second)), 10, ((0, 1), (0, 1)))
    assert abs(statistic(pairs, np.full((10, 10), 500.0))) < 4


def test_noise_without_the_position_would_be_found(monkeypatch) -> None:
    real = noise.philox
    monkeypatch.setattr(noise, "philox", lambda counter, key: real((counter[0], 0, *counter[2:]), key))
    pairs, _, _ = np.histogram2d(
        *(np.exp(-np.exp(-gumbel(SEED, position, np.arange(50_000)))) for position in (0, 1)), 10, ((0, 1), (0, 1))
    )
    assert statistic(pairs, np.full((10, 10), 500.0)) > 100
