"""The gate over moving squares, real photos and arbitrary pictures."""

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_runtime.capture.motion_gate import MAX_WIDTH, WARM_UP_FRAMES, Inspection, MotionGate, shrink
from edge_runtime.config import MotionConfig
from edge_runtime.errors import ConfigError
from edge_runtime.picture_checks import decode_picture, decode_small
from testbed.sample_photos import SHIPPED, shipped

ON = MotionConfig(enabled=True)
HEIGHT, WIDTH = 100, 160
CLOCK = "0,0,1,0,1,0.2,0,0.2"  # a mask over the uppermost fifth


def wall(seed: int = 0) -> np.ndarray:
    """A grey scene with texture, as a camera sees it: smooth, from dark to light."""
    coarse = np.random.default_rng(seed).integers(40, 200, (5, 8), np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def with_box(picture: np.ndarray, x: int, y: int, size: int = 20, shade: int = 255) -> np.ndarray:
    picture = picture.copy()
    picture[y : y + size, x : x + size] = shade
    return picture


def reasons(gate: MotionGate, *pictures: np.ndarray) -> list[str]:
    """What the gate says of each picture, at one per second."""
    return [gate.inspect(picture, float(second)).why for second, picture in enumerate(pictures)]


def test_without_motion_gating_every_frame_passes():
    gate = MotionGate(MotionConfig())
    assert [gate.inspect(wall(), t).passes for t in range(3)] == [True] * 3


def test_an_object_that_appears_and_moves_is_motion_and_the_empty_scene_is_not():
    gate = MotionGate(ON)
    seen = reasons(gate, wall(), wall(), with_box(wall(), 10, 30), with_box(wall(), 90, 60), wall())
    assert seen == ["warm-up", "still", "motion", "motion", "still"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "motion"),
        ({"contour_area": 200}, "still"),  # a box of 10 x 10
        ({"threshold": 200}, "still"),
        ({"threshold": 1, "contour_area": 0}, "motion"),
        ({"mask": ("0.1,0.2,0.4,0.2,0.4,0.6,0.1,0.6",)}, "still"),  # over it
        ({"mask": (CLOCK,)}, "motion"),
        ({"mask": (CLOCK, "0.1,0.2,0.4,0.2,0.4,0.6,0.1,0.6")}, "still"),
    ],
)
def test_the_settings_decide_what_is_motion(settings, why):
    gate = MotionGate(MotionConfig(enabled=True, improve_contrast=False, **settings))
    background = np.full((HEIGHT, WIDTH), 100, np.uint8)
    assert reasons(gate, background, background, with_box(background, 30, 30, 10))[-1] == why


def test_a_lamp_that_goes_on_and_off_is_lightning_and_the_gate_learns_the_new_light():
    gate = MotionGate(MotionConfig(enabled=True, improve_contrast=False))
    bright = cv2.add(wall(), 70)
    assert reasons(gate, wall(), wall(), bright, bright, bright, with_box(bright, 50, 50, shade=0)) == [
        "warm-up",
        "still",
        "lightning",
        "warm-up",
        "still",
        "motion",
    ]
    assert reasons(gate, wall(), wall(), wall()) == ["lightning", "warm-up", "still"]


def test_lightning_is_measured_outside_the_mask():
    gate = MotionGate(MotionConfig(enabled=True, improve_contrast=False, mask=("0,0,1,0,1,0.5,0,0.5",)))
    assert reasons(gate, wall(), wall(), cv2.add(wall(), 70))[-1] == "lightning"


def test_a_street_that_is_never_calm_has_motion_after_the_warm_up():
    """Boxes that change a tenth of the picture, each time elsewhere."""
    gate = MotionGate(ON)
    boxes = [with_box(wall(), 40 * (n % 4), 30, 40, shade=255 * (n % 2)) for n in range(WARM_UP_FRAMES + 5)]
    seen = reasons(gate, *boxes)
    assert set(seen[: WARM_UP_FRAMES - 1]) == {"warm-up"}
    assert set(seen[WARM_UP_FRAMES:]) == {"motion"}


def test_an_object_that_stays_becomes_background():
    gate = MotionGate(MotionConfig(enabled=True, frame_alpha=0.1))
    parked = with_box(wall(), 50, 50)
    assert reasons(gate, wall(), wall())[-1] == "still"
    seen = reasons(gate, *[parked] * 60)
    assert seen[0] == "motion"
    assert seen[-1] == "still"
    assert seen == sorted(seen)  # once background, it stays so


def test_slowly_fading_daylight_is_no_motion():
    gate = MotionGate(MotionConfig(enabled=True, frame_alpha=0.1))
    evening = [cv2.subtract(wall(), step) for step in range(0, 100)]
    assert set(reasons(gate, *evening)[1:]) == {"still"}


@pytest.mark.parametrize("improve_contrast", [True, False])
def test_the_noise_of_a_dark_night_is_no_motion(improve_contrast):
    gate = MotionGate(MotionConfig(enabled=True, improve_contrast=improve_contrast))
    rng = np.random.default_rng(1)
    night = [np.clip(rng.normal(12, 3, (HEIGHT, WIDTH)), 0, 255).astype(np.uint8) for _ in range(30)]
    assert set(reasons(gate, *night)[1:]) == {"still"}


def test_improved_contrast_finds_motion_in_fog():
    fog = 100 + wall() // 10
    for improve_contrast, why in ((True, "motion"), (False, "still")):
        gate = MotionGate(MotionConfig(enabled=True, improve_contrast=improve_contrast))
        assert reasons(gate, fog, fog, with_box(fog, 50, 50, shade=130))[-1] == why


def test_a_frame_passes_after_max_interval_s_without_motion_and_motion_restarts_the_interval():
    gate = MotionGate(ON, max_interval_s=10)
    still = [gate.inspect(wall(), t).why for t in (0, 1, 9.9, 10, 15)]
    assert still == ["interval", "still", "still", "interval", "still"]
    assert gate.inspect(with_box(wall(), 50, 50), 16).why == "motion"
    assert [gate.inspect(wall(), t).why for t in (20, 25.9, 26)] == ["still", "still", "interval"]


def test_without_max_interval_s_a_still_scene_never_passes():
    gate = MotionGate(ON)
    assert not any(gate.inspect(wall(), 86400.0 * day).passes for day in range(10))


def test_a_gate_that_is_switched_on_again_learns_the_background_again():
    gate = MotionGate(ON)
    reasons(gate, wall(), wall())
    gate.enabled = False
    assert reasons(gate, wall(1))[-1] == "off"
    gate.enabled = True
    assert reasons(gate, wall(1), wall(1)) == ["warm-up", "still"]


def test_after_a_change_of_resolution_the_background_is_learned_again():
    gate = MotionGate(MotionConfig(enabled=True, mask=(CLOCK,)))
    assert reasons(gate, wall(), wall()[:60], wall()[:60], wall()) == ["warm-up", "warm-up", "still", "warm-up"]


# ---- the frozen picture ----


def test_a_picture_is_the_same_while_only_a_masked_clock_changes():
    gate = MotionGate(MotionConfig(mask=(CLOCK,)))
    same = [gate.inspect(with_box(wall(), 20 * (t % 5), 0, 10), t).same_s for t in range(10)]
    assert same == list(range(10))
    assert gate.inspect(with_box(wall(), 50, 50, 2), 10).same_s == 0


def test_two_pictures_with_the_noise_of_a_sensor_are_never_the_same():
    gate = MotionGate(MotionConfig())
    rng = np.random.default_rng(1)
    noisy = [np.clip(wall() + rng.normal(0, 1, wall().shape), 0, 255).astype(np.uint8) for _ in range(20)]
    assert {gate.inspect(picture, t).same_s for t, picture in enumerate(noisy)} == {0.0}


def test_a_picture_of_one_colour_is_flat():
    gate = MotionGate(MotionConfig(mask=(CLOCK,)))
    black = np.zeros((HEIGHT, WIDTH), np.uint8)
    assert gate.inspect(with_box(black, 50, 5, 10), 0).flat
    assert not gate.inspect(with_box(black, 50, 50, 1), 1).flat


# ---- real photos ----


@pytest.mark.parametrize("decode", [decode_picture, lambda jpeg: decode_small(jpeg, ON.frame_height)])
@pytest.mark.parametrize("name", [name for _, _, name, _ in SHIPPED])
def test_in_a_real_scene_an_object_is_motion_and_jpeg_noise_is_not(name, decode):
    photo = next((p for p in shipped() if p.name == name), None)
    if photo is None:
        pytest.skip(f"the package with the photo {name} is not installed")
    scene = decode_picture(photo.data)
    other = decode_picture(next(p for p in shipped() if p.name != name).data)
    height, width = scene.shape[:2]
    passing = scene.copy()
    passing[height // 3 : 2 * height // 3, width // 3 : width // 2] = cv2.resize(
        other, (width // 2 - width // 3, 2 * height // 3 - height // 3)
    )
    gate = MotionGate(ON)
    seen = []
    for second, (pixels, quality) in enumerate(
        [(scene, 90), (scene, 60), (scene, 75), (passing, 75), (scene, 75), (255 - scene, 75)]
    ):
        sent = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        seen.append(gate.inspect(shrink(decode(sent), ON.frame_height), second).why)
    assert seen[:5] == ["warm-up", "still", "still", "motion", "still"]
    assert seen[5] in ("lightning", "motion")


# ---- any picture ----


@given(st.integers(1, 900), st.integers(1, 900), st.integers(16, 480), st.integers(0, 255), st.integers(0, 255))
def test_a_frame_of_any_shape_is_shrunk_and_never_enlarged(height, width, frame_height, one, other):
    pixels = np.full((height, width, 3), one, np.uint8)
    pixels[: height // 2] = other
    grey = shrink(pixels, frame_height)
    assert grey.dtype == np.uint8
    assert grey.shape[0] == min(frame_height, height)
    assert 1 <= grey.shape[1] <= min(width, MAX_WIDTH * frame_height)
    low, high = int(pixels.min()), int(pixels.max())
    assert low <= int(grey.min()) <= int(grey.max()) <= high
    assert int(grey[-1, -1]) == one


@pytest.mark.parametrize("shape", [(1, 40_000, 3), (40_000, 1, 3), (8, 6_000_000, 3)])
def test_a_frame_of_absurd_shape_costs_little_memory(shape):
    assert shrink(np.zeros(shape, np.uint8), 100).size <= 100 * 100 * MAX_WIDTH


POLYGONS = st.lists(st.floats(0, 1), min_size=6, max_size=12).filter(lambda n: len(n) % 2 == 0)


@given(
    st.lists(arrays(np.uint8, (20, 30)), min_size=1, max_size=8),
    st.builds(
        MotionConfig,
        enabled=st.just(True),
        threshold=st.integers(1, 255),
        contour_area=st.integers(0, 100),
        frame_alpha=st.floats(0.001, 1),
        improve_contrast=st.booleans(),
        lightning_threshold=st.floats(0.3, 1),
    ),
    st.floats(0, 5),
)
def test_inspections_are_repeatable_and_only_motion_and_the_interval_let_frames_pass(pictures, settings, interval):
    def run() -> list[Inspection]:
        gate = MotionGate(settings, interval)
        return [gate.inspect(picture, t) for t, picture in enumerate(pictures)]

    seen = run()
    assert seen == run()
    assert seen[0].why == ("interval" if interval else "warm-up")
    last = -np.inf
    for t, inspection in enumerate(seen):
        assert inspection.passes == (inspection.why in ("motion", "interval"))
        assert 0 <= inspection.changed <= 1
        assert inspection.passes or not interval or t - last < interval
        assert inspection.why != "interval" or t - last >= interval
        last = t if inspection.passes else last


@given(arrays(np.uint8, (20, 30)), st.integers(1, 10), POLYGONS)
def test_the_same_picture_again_is_never_motion(picture, count, polygon):
    mask = (",".join(map(str, polygon)),)
    try:
        gate = MotionGate(MotionConfig(enabled=True, mask=mask))
    except ConfigError:  # it covers everything
        return
    assert set(reasons(gate, *[picture] * count)) <= {"warm-up", "still"}


# ---- settings ----


@pytest.mark.parametrize(
    "polygon", ["", "0,0", "0,0,1,1", "0,0,1,0,1", "0,0,1,0,1,1.1", "0,0,1,0,1,-0.1", "0,0,1,0,1,nan", "a,b,c,d,e,f"]
)
def test_a_mask_that_is_no_polygon_is_refused_and_named(polygon):
    with pytest.raises(msgspec.ValidationError, match=rf'mask "{polygon}" is not a polygon: want "x1,y1,'):
        msgspec.convert({"mask": [polygon]}, MotionConfig)


@given(POLYGONS)
def test_a_polygon_is_read_as_its_corners(numbers):
    corners = MotionConfig(mask=(", ".join(map(str, numbers)),)).polygons()
    assert corners == (tuple(zip(numbers[::2], numbers[1::2], strict=True)),)


def test_a_mask_over_everything_is_refused():
    with pytest.raises(ConfigError, match="covers the whole picture"):
        MotionGate(MotionConfig(mask=("0,0,1,0,1,0.5,0,0.5", "0,0.5,1,0.5,1,1,0,1")))
