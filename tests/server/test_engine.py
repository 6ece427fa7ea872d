"""The engine on a small bundle: an answer is the same alone and in any batch, with any draft, to the bit."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from edge_runtime.inference.bundle import BOS, EOS, PAD, Bundle, BundleError, FileRecord, file_hash
from models.family import LATENT, DecoderShape, Tail, TextDecoder
from models.lookahead import Lookahead, LookaheadNet
from models.recipe.stage10_lookahead import Texts, loss_of
from server import loading
from server.engine import (
    BLOCK,
    LONE_BLOCK,
    WIDTHS,
    Answer,
    DecodingBatch,
    Engine,
    Job,
    Proof,
    Shape,
    cheapest,
    encode_image,
)
from server.loading import load_engine, ready_engine
from server.numerics import REJECTED, prove, read
from server.packed import PackedLinear, pack
from server.verify import new_text
from tests.bundles import CLASSES, MAX_TOKENS, VOCABULARY, lively, random_symbols, tiny_bundle

TIERS = ("edge", "cloud")
SYMBOLS = random_symbols(16, seed=1)


def result(answer: Answer) -> tuple[object, ...]:
    """What must be the same to the bit."""
    return answer.tokens, answer.confidence, answer.scores, answer.error


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, list[Answer]]:
    """Every latent's answer by itself, without a draft."""
    return {tier: [engine.answer([Job(s, tier=tier, wants_label=True)])[0] for s in SYMBOLS] for tier in TIERS}


def test_an_answer_is_the_same_while_another_thread_computes(engine: Engine, alone: dict[str, list[Answer]]) -> None:
    def answers(seed: int) -> None:
        order = random.Random(seed).sample(range(len(SYMBOLS)), len(SYMBOLS))
        for tier in TIERS:
            jobs = [Job(SYMBOLS[i], tier=tier, wants_label=True) for i in order]
            assert list(map(result, engine.answer(jobs))) == [result(alone[tier][i]) for i in order]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(answers, range(8)))


def test_the_small_bundle_writes_texts_worth_comparing(alone: dict[str, list[Answer]]) -> None:
    texts = [answer.tokens for answer in alone["edge"]]
    assert len(set(texts)) > 8
    assert len({len(text) for text in texts}) > 5
    assert {len(text) == MAX_TOKENS for text in texts} == {True, False}


@pytest.mark.parametrize("tier", TIERS)
def test_every_token_is_the_one_that_training_would_have_put_first(engine: Engine, alone, tier: str) -> None:
    decoder = engine.decoders[tier]
    with torch.inference_mode():
        memory = encode_image(decoder, engine.features([Job(s) for s in SYMBOLS], (1,)), (1,))
        for i, answer in enumerate(alone[tier]):
            emitted = [*answer.tokens, EOS][:MAX_TOKENS]
            logits = decoder(torch.tensor([[BOS, *emitted[:-1]]]), [(k[i : i + 1], v[i : i + 1]) for k, v in memory])[0]
            chosen = logits[range(len(emitted)), emitted]
            assert torch.all(chosen > (logits + decoder.never_emitted).max(-1).values - 1e-4)
            probability = (logits + decoder.never_emitted).softmax(-1)[range(len(emitted)), emitted]
            assert answer.confidence == pytest.approx(probability.log().mean().exp().item(), abs=1e-4)


def test_the_start_test_proves_batches_and_blocks_on_this_machine(engine: Engine) -> None:
    assert engine.proof.may_speculate
    assert {(1, BLOCK), (8, BLOCK)} <= set(engine.proof.shapes)
    assert prove(engine) == engine.proof


def draft_of(tokens: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """A draft somewhere between perfect and worthless."""
    chosen = random.Random(seed)
    agreement = chosen.choice((0.0, 0.5, 0.8, 0.95, 1.0))
    draft = [token if chosen.random() < agreement else chosen.randrange(-1, VOCABULARY + 1) for token in tokens]
    return tuple(draft[chosen.randrange(2) :] + [5] * chosen.randrange(3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 15), st.sampled_from(TIERS), st.integers(0, 99)), min_size=1, max_size=11)
)
def test_any_batch_with_any_drafts_answers_as_each_row_alone(engine, alone, rows) -> None:
    jobs = [
        Job(SYMBOLS[i], draft=draft_of(alone[tier][i].tokens, seed), tier=tier, wants_label=True)
        for i, tier, seed in rows
    ]
    for (i, tier, _), answer in zip(rows, engine.answer(jobs), strict=True):
        assert result(answer) == result(alone[tier][i])
        assert 0 <= answer.accepted <= answer.proposed
        written = len(answer.tokens) - answer.accepted - answer.accepted_again
        assert written <= answer.passes <= alone[tier][i].passes


def test_a_perfect_draft_needs_one_pass_a_block(engine: Engine, alone: dict[str, list[Answer]]) -> None:
    block = LONE_BLOCK if (1, LONE_BLOCK) in engine.proof.shapes else BLOCK
    for own, symbols in zip(alone["edge"], SYMBOLS, strict=True):
        answer = engine.answer([Job(symbols, draft=own.tokens)])[0]
        emitted = min(len(own.tokens) + 1, MAX_TOKENS)
        assert (answer.tokens, answer.passes) == (own.tokens, -(-emitted // block))
        assert answer.accepted == answer.proposed == min(len(own.tokens), MAX_TOKENS - 1)
    assert all(own.passes == min(len(own.tokens) + 1, MAX_TOKENS) for own in alone["edge"])


def taught(engine: Engine, texts: list[tuple[int, ...]]) -> Lookahead:
    """A lookahead that knows the edge's texts about SYMBOLS by heart."""
    decoder = engine.decoders["edge"]
    tokens = np.zeros((len(texts), MAX_TOKENS + 2), np.int16)
    hidden = np.zeros((*tokens.shape, decoder.shape.width), np.float16)
    with torch.inference_mode():
        memory = encode_image(decoder, engine.features([Job(s) for s in SYMBOLS], (1,)), (1,))
        for i, text in enumerate(texts):
            read_again = torch.tensor([[BOS, *text]])
            image = [(keys[i : i + 1], values[i : i + 1]) for keys, values in memory]
            states = decoder.read(read_again, torch.tensor([0]), image, decoder.new_cache(1, BLOCK))[0]
            tokens[i, : len(text) + 2] = [BOS, *text, EOS]
            hidden[i, 1 : len(states) + 1] = states.numpy()
    torch.manual_seed(0)
    net = LookaheadNet(decoder.shape.width, VOCABULARY)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss_of(net, Texts(tokens, hidden), np.arange(VOCABULARY), 0.0).backward()
        optimiser.step()
    return Lookahead(range(VOCABULARY), net)


@pytest.mark.parametrize("size", [1, 8])
def test_a_lookahead_saves_passes_where_there_is_a_draft_and_changes_no_text(bundle: Bundle, alone, size: int) -> None:
    informed = ready_engine(bundle, TIERS)
    informed.lookaheads = {"edge": taught(informed, [answer.tokens for answer in alone["edge"]])}
    # Wrong from the first word on, empty, and none.
    for draft, saves in (((4, 4, 4), True), ((), True), (None, False)):
        jobs = [Job(s, draft=draft, wants_label=True) for s in SYMBOLS]
        answers = [a for i in range(0, len(jobs), size) for a in informed.answer(jobs[i : i + size])]
        assert [result(a) for a in answers] == [result(a) for a in alone["edge"]]
        assert (sum(a.passes for a in answers) < sum(a.passes for a in alone["edge"])) == saves
        assert (sum(a.accepted_again for a in answers) > 0) == saves


@pytest.mark.parametrize("draft", [(-1,), (VOCABULARY,), (1 << 31,), (5,) * 10**6, (0, 1, 2, 3), (EOS,)])
def test_a_hostile_draft_changes_nothing(
    engine: Engine, alone: dict[str, list[Answer]], draft: tuple[int, ...]
) -> None:
    assert result(engine.answer([Job(SYMBOLS[0], draft=draft, wants_label=True)])[0]) == result(alone["edge"][0])


@pytest.mark.parametrize("limit", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, MAX_TOKENS, 500])
def test_a_shorter_limit_cuts_the_same_text(engine: Engine, alone: dict[str, list[Answer]], limit: int) -> None:
    for draft in ((), alone["cloud"][3].tokens):
        answer = engine.answer([Job(SYMBOLS[3], draft=draft, tier="cloud", max_tokens=limit)])[0]
        assert answer.tokens == alone["cloud"][3].tokens[:limit]
        assert answer.is_cut is (len(answer.tokens) == min(limit, MAX_TOKENS))  # with an end, it has one token less


def test_the_tail_is_told_the_level_and_what_has_arrived(engine: Engine, alone: dict[str, list[Answer]]) -> None:
    coarse, partial = engine.answer([Job(SYMBOLS[0], level=0), Job(SYMBOLS[0], channels=16)])
    assert len({coarse.confidence, partial.confidence, alone["edge"][0].confidence}) == 3


def test_a_row_without_numbers_fails_by_name_and_leaves_its_neighbours_alone(engine, alone) -> None:
    jobs = [Job(s, wants_label=True) for s in SYMBOLS[:8]]
    jobs[2] = replace(jobs[2], symbols=np.full(LATENT, np.nan), draft=(5, 6, 7))
    answers = engine.answer(jobs)
    assert "no finite numbers" in answers.pop(2).error
    assert [result(a) for a in answers] == [result(a) for i, a in enumerate(alone["edge"][:8]) if i != 2]
    assert result(engine.answer(jobs[:1])[0]) == result(alone["edge"][0])


def test_rejected_tokens_in_the_cache_leave_no_trace_but_a_nan_would(engine: Engine) -> None:
    decoder = engine.decoders["edge"]
    with torch.inference_mode():
        memory = encode_image(decoder, engine.features([Job(SYMBOLS[0])], (1,)), (1,))
        text = torch.tensor([[1, 9, 8, 7, 6, 5, 9, 8, 7]])
        clean = read(decoder, memory, text, (1, BLOCK), cuts=(3,))
        assert torch.equal(clean, read(decoder, memory, text, (1, BLOCK), cuts=(3,), left=1e3))
        assert read(decoder, memory, text, (1, BLOCK), cuts=(3,), left=float("nan")).isnan().any()


def test_each_pass_has_the_cheapest_proven_shape_and_the_texts_do_not_depend_on_it(engine: Engine, alone) -> None:
    decoder, rows = engine.decoders["edge"], [0, 1, 2, 3, 4, 5, 6, 7]
    drafts = [alone["edge"][i].tokens if i == 2 else () for i in rows]
    with torch.inference_mode():
        memory = encode_image(decoder, engine.features([Job(SYMBOLS[row]) for row in rows], (1,)), (1,))
        texts = [new_text(draft, VOCABULARY, MAX_TOKENS) for draft in drafts]
        batch = DecodingBatch(decoder, memory, texts, engine.proof.shapes)
        used = []
        while batch.unfinished:
            used.append(batch.step())
    assert used[0][0] == 8
    assert set(used) <= set(engine.proof.shapes)
    assert len(set(used)) > 1
    assert [text.without_end for text in batch.texts] == [alone["edge"][i].tokens for i in rows]


@pytest.mark.parametrize(
    ("rows", "width", "shape"), [(1, 1, (1, 16)), (2, 4, (4, 4)), (3, 5, (4, 8)), (8, 4, (8, 4)), (5, 9, (8, 16))]
)
def test_the_cheapest_shape_holds_all_rows_and_reads_the_fewest_tokens(rows: int, width: int, shape: Shape) -> None:
    assert cheapest(((1, 16), (4, 4), (4, 8), (4, 16), (8, 4), (8, 8), (8, 16)), rows, width) == shape


def test_an_engine_without_proof_ignores_drafts_and_answers_the_same(bundle: Bundle, alone) -> None:
    unproven = load_engine(bundle, TIERS)
    pack(unproven.tail, *unproven.decoders.values())
    assert unproven.proof == Proof()
    answers = unproven.answer([Job(s, draft=(5, 6, 7), wants_label=True) for s in SYMBOLS[:5]])
    assert [result(a) for a in answers] == [result(a) for a in alone["edge"][:5]]
    assert all(a.proposed == 0 for a in answers)


def full_size_decoder() -> TextDecoder:
    torch.manual_seed(0)
    decoder = TextDecoder(DecoderShape(512, width=256, heads=4, encoder_layers=0, decoder_layers=1))
    return lively(decoder).eval().requires_grad_(False)


def test_passes_of_one_token_would_be_found_to_differ_from_blocks() -> None:
    """The negative control of the start test: where the library sums one row otherwise, it must see that."""
    x, weight = torch.randn(BLOCK, 256), torch.randn(512, 256)
    if torch.equal(torch.nn.functional.linear(x[:1], weight), torch.nn.functional.linear(x, weight)[:1]):
        pytest.skip("this library multiplies one row with the same bits as many")
    decoder = full_size_decoder()
    with torch.inference_mode():
        memory, text = decoder.encode_image(torch.rand(1, 49, 1280)), torch.randint(4, 512, (1, 24))
        blocks = read(decoder, memory, text, (1, BLOCK), cuts=(BLOCK,))
        assert torch.equal(blocks, read(decoder, memory, text, (1, BLOCK), cuts=(1,)))
        assert not torch.equal(blocks, read(decoder, memory, text, (1, 1), cuts=(1,)))


@pytest.mark.parametrize(
    "flaw",
    [
        lambda tokens, cache: torch.arange(tokens.shape[1])[None, :, None],  # a token's place in its block
        lambda tokens, cache: tokens[:, -1, None, None] == REJECTED,  # what follows the real tokens
        lambda tokens, cache: cache.keys[0][:, 0, -1, 0, None, None],  # what an earlier pass left behind
    ],
)
def test_a_device_whose_bits_depend_on_blocks_may_not_speculate(engine: Engine, monkeypatch, flaw) -> None:
    step = TextDecoder.step

    def flawed(self, tokens, start, memory, cache):
        return step(self, tokens, start, memory, cache) + 1e-3 * flaw(tokens, cache)

    monkeypatch.setattr(TextDecoder, "step", flawed)
    proof = prove(engine)
    assert (proof.may_speculate, proof.shapes) == (False, ((1, BLOCK),))


def test_a_batch_size_with_other_bits_is_not_used(engine: Engine, monkeypatch) -> None:
    step, forward, encode = TextDecoder.step, Tail.forward, TextDecoder.encode_image
    odd = 1 + 1e-6
    monkeypatch.setattr(TextDecoder, "step", lambda self, x, *rest: step(self, x, *rest) * (odd if len(x) == 4 else 1))
    monkeypatch.setattr(TextDecoder, "encode_image", lambda self, x, _: encode(self, x * (odd if len(x) == 8 else 1)))
    monkeypatch.setattr(Tail, "forward", lambda self, x, *rest: forward(self, x, *rest) * (odd if len(x) > 1 else 1))
    proof = prove(engine)
    assert (proof.tail_sizes, proof.image_sizes) == ((1,), (1, 4))
    assert proof.shapes == tuple(shape for shape in engine.proof.shapes if shape[0] != 4)
    assert proof.numerics == engine.proof.numerics  # one row alone has the bits it had


def test_packed_weights_give_the_same_texts_as_plain_ones(engine: Engine, bundle: Bundle, alone) -> None:
    plain = load_engine(bundle, TIERS)
    assert any(isinstance(layer, PackedLinear) for layer in engine.tail.modules())
    jobs = [Job(symbols, wants_label=True) for symbols in SYMBOLS]
    assert torch.allclose(plain.features(jobs, (8,)), engine.features(jobs, (8,)), atol=1e-4)
    answers = [plain.answer([job])[0] for job in jobs]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone["edge"]]
    assert [a.confidence for a in answers] == pytest.approx([a.confidence for a in alone["edge"]], abs=1e-4)


def test_plain_weights_are_used_where_packed_ones_would_forbid_drafts(bundle: Bundle, monkeypatch) -> None:
    forward = PackedLinear.forward

    def flawed(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[-2], dtype=torch.float32)
        return forward(self, x) + 1e-5 * places[:, None]  # bits depend on a token's place in its block

    monkeypatch.setattr(PackedLinear, "forward", flawed)
    engine = ready_engine(bundle, ("edge",), sizes=(1,))
    assert engine.proof.may_speculate
    assert not is_packed(engine)


def is_packed(engine: Engine) -> bool:
    layers = (*engine.tail.modules(), *engine.decoders["edge"].modules())
    return any(isinstance(layer, PackedLinear) for layer in layers)


def test_plain_weights_are_used_where_packed_ones_prove_fewer_batch_sizes(bundle: Bundle, monkeypatch) -> None:
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * (1 + 1e-6 * (len(x) == 4)))
    engine = ready_engine(bundle, ("edge",), sizes=(1, 4))
    assert 4 in engine.proof.image_sizes
    assert not is_packed(engine)


def test_packed_weights_are_used_where_plain_ones_prove_no_more(bundle: Bundle, monkeypatch) -> None:
    step = TextDecoder.step
    odd = 1 + 1e-6
    monkeypatch.setattr(TextDecoder, "step", lambda self, x, *rest: step(self, x, *rest) * (odd if len(x) == 4 else 1))
    engine = ready_engine(bundle, ("edge",), sizes=(1, 4))
    assert all(size == 1 for size, _ in engine.proof.shapes)
    assert is_packed(engine)


def test_the_start_test_runs_once_if_packed_weights_prove_everything(bundle: Bundle, monkeypatch) -> None:
    loaded: list[Engine] = []
    monkeypatch.setattr(loading, "load_engine", lambda *asked: loaded.append(load_engine(*asked)) or loaded[-1])
    whole = Proof((1, 4), (1, 4), tuple(product((1, 4), WIDTHS)), may_speculate=True)
    monkeypatch.setattr(loading, "prove", lambda *_: whole)
    assert ready_engine(bundle, ("edge",), sizes=(1, 4)) is loaded[0]
    assert len(loaded) == 1


def test_weights_stay_plain_where_the_operators_are_missing(bundle: Bundle, monkeypatch) -> None:
    engine = load_engine(bundle, ("edge",))
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not pack(engine.tail, *engine.decoders.values())
    assert engine.answer([Job(SYMBOLS[0])])[0].tokens


TWO_THREADS = """
import sys
from dataclasses import replace
from pathlib import Path
from edge_runtime.inference.bundle import open_bundle
from server.engine import Job
from server.loading import ready_engine
from tests.bundles import random_symbols

engine = ready_engine(open_bundle(Path(sys.argv[1])), ("edge",), threads=2, sizes=(1, 2))
jobs = [Job(symbols) for symbols in random_symbols(3, seed=1)]
own = [engine.answer([job])[0] for job in jobs]
drafted = [replace(job, draft=(*answer.tokens[:-3], 5, 6)) for job, answer in zip(jobs, own)]
same = [(a.tokens, a.confidence) == (b.tokens, b.confidence) for a, b in zip(engine.answer(drafted), own)]
print(same, engine.proof.may_speculate, {answer.tokens for answer in own} != {()})
"""


def test_two_threads_keep_the_promise_too(bundle: Bundle) -> None:
    # In a process of its own: torch's thread count is one for all, and OpenMP's way of waiting is fixed at its import.
    command = [sys.executable, "-c", TWO_THREADS, str(bundle.path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.split() == [*str([True] * 3).split(), "True", "True"]


def test_labels_are_sorted_probabilities(alone: dict[str, list[Answer]]) -> None:
    scores = alone["edge"][0].scores
    assert set(scores) == set(CLASSES)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)


def test_a_decoder_sees_the_words_of_the_labels_that_the_board_has_seen(engine: Engine) -> None:
    decoder = TextDecoder(DecoderShape(VOCABULARY, 16, 2, label_words=3))
    names = [(5 + number, 30 + number) for number in range(len(CLASSES))]
    seeing = Engine(engine.tail, {"edge": decoder}, engine.classifier, CLASSES, label_words=names)
    jobs = [Job(SYMBOLS[0], labels={number: 1.0}) for number in range(len(CLASSES))]
    words = seeing.words_seen(decoder, seeing.label_logits(seeing.features(jobs)), jobs)
    assert words.tolist() == [[*name, PAD] for name in names]


def test_the_float_head_gives_symbols_of_a_picture(engine: Engine) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    symbols = engine.symbols(pixels)
    assert (symbols.dtype, symbols.shape) == (np.int8, (64, 7, 7))
    assert np.abs(symbols).max() > 0
    with torch.inference_mode():
        latent = engine.head(torch.from_numpy(pixels)[None])[0].numpy()
    assert np.array_equal(symbols, np.rint(latent).clip(-127, 127))


def test_a_bundle_that_lacks_a_tier_or_weights_is_refused_by_name(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no target lunar"):
        load_engine(bundle, ("lunar",))
    mixed_up = {"edge": msgspec.structs.replace(bundle.manifest.targets["edge"], file="cloud.safetensors")}
    wrong = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, targets=mixed_up))
    with pytest.raises(BundleError, match="does not hold this network's weights"):
        load_engine(wrong, ("edge",))


def with_file(bundle: Bundle, name: str, data: bytes) -> Bundle:
    """The bundle with a file replaced, as if it had been built so."""
    (bundle.path / name).write_bytes(data)
    record = {name: FileRecord(file_hash(bundle.path / name), len(data))}
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, files=bundle.manifest.files | record))


def test_a_file_that_is_no_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="no readable safetensors"):
        load_engine(with_file(bundle, "edge.safetensors", b"\x00" * 10_000), ("edge",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["tail.safetensors", "edge.safetensors", "head.safetensors", "lookahead-edge.safetensors"]
)
def test_weights_that_are_not_finite_are_found_at_start_by_name(tmp_path: Path, name: str, value: float) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    tensors = load_file(bundle.path / name)
    key = max(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[key].view(-1)[-1] = value
    with pytest.raises(BundleError, match=f"{name}: tensor '{key}' has NaN or infinite values"):
        load_engine(with_file(bundle, name, save(tensors)), ("edge",))


def test_a_lookahead_may_be_missing_but_not_wrong(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    of_cloud = (bundle.path / "lookahead-cloud.safetensors").read_bytes()
    with pytest.raises(
        BundleError, match=r"lookahead-edge.safetensors is no lookahead of the target edge: .* width 32"
    ):
        load_engine(with_file(bundle, "lookahead-edge.safetensors", of_cloud), ("edge",))
    files = {name: record for name, record in bundle.manifest.files.items() if name != "lookahead-edge.safetensors"}
    without = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, files=files))
    assert load_engine(without, ("edge", "cloud")).lookaheads.keys() == {"cloud"}
