"""Pictures as other codecs send them, and the tail that is trained on them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.backbone import pretrained_lite0
from models.coded_pictures import SIZES, picture_codecs, without_container
from models.family import Tail
from models.recipe import codec_tail
from models.recipe.stage3_bottleneck import GAINS, Cut
from models.recipe.stage4_head import trained_head
from models.recipe.workspace import Workspace
from tests import exports


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    photos: np.ndarray = exports.pictures(4, seed=5).numpy()
    return photos


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_a_picture_costs_more_bytes_and_comes_closer_with_size_and_quality(name: str, photos: np.ndarray) -> None:
    if name not in picture_codecs():
        pytest.skip(f"this build of OpenCV writes no {name}")
    codec, photo = picture_codecs()[name], photos[0]
    lengths, errors = [], []
    for size, quality in ((SIZES[0], codec.qualities[0]), (SIZES[0], codec.qualities[-1]), (224, codec.qualities[-1])):
        data, received = codec.code(photo, size, quality)
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (size, size, 3)
        assert received.shape == photo.shape
        lengths.append(len(data))
        errors.append(np.abs(received.astype(int) - photo).mean())
    assert lengths == sorted(lengths)
    assert errors == sorted(errors, reverse=True)
    # Red and blue are where they were: swapped, the picture would be further from the photo.
    assert errors[-1] < np.abs(received[..., ::-1].astype(int) - photo).mean()


def test_of_an_avif_the_boxes_can_be_left_out(photos: np.ndarray) -> None:
    for name, codec in picture_codecs().items():
        data, _ = codec.code(photos[0], 96, codec.qualities[1])
        if name == "avif":
            assert 200 < len(data) - without_container(data) < 400
        else:
            assert without_container(data) == len(data)


def test_the_tail_is_trained_on_coded_pictures_and_can_be_loaded(
    photos: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_tail, "PHOTOS", 2)
    work = Workspace(tmp_path)
    np.save(tmp_path / "photos-train.npy", photos)
    before = Cut(pretrained_lite0(), vocabulary=40).state_dict()
    work.save("3-bottleneck", {"average": before})
    torch.save(trained_head(work).state_dict(), tmp_path / "head.pt")
    codec_tail.run(work, codec_tail.Settings(steps=2), tmp_path / "tail.safetensors")
    after = load_file(tmp_path / "tail.safetensors")
    Tail(len(GAINS)).load_state_dict(after)
    moved = {name for name, weight in after.items() if not weight.equal(before[f"tail.{name}"])}
    assert {"linear.weight", "blocks.0.layers.0.weight", "features.weight", "steps"} <= moved
    assert work.figures(codec_tail.NAME)["kl"] > 0
