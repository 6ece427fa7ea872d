"""Several views per photo (crops and flips), and their maps behind the backbone's frozen blocks, as float16.

A cached map cannot be augmented later, so there are several views; 31 KB each.
"""

import cv2
import numpy as np
import torch

from edge_runtime.inference.preprocess import PIXELS
from models.backbone import FROZEN_CHANNELS, pretrained_lite0
from models.recipe.workspace import Workspace, blocks, channels_last

NAME = "2-views"
VIEWS = {"train": 4, "unlabelled": 4, "labelled": 1}
BATCH = 32


def view_of(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [224, 224, 3] to a random crop (60 to 100 % of the area, mildly stretched) and flip, same shape."""
    area, stretch = rng.uniform(0.6, 1.0), np.exp(rng.uniform(-0.15, 0.15))
    height, width = (min(1.0, np.sqrt(area * s)) for s in (stretch, 1 / stretch))
    h, w = round(PIXELS * height), round(PIXELS * width)
    y, x = rng.integers(0, PIXELS - h + 1), rng.integers(0, PIXELS - w + 1)
    crop = pixels[y : y + h, x : x + w]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return cv2.resize(np.ascontiguousarray(crop), (PIXELS, PIXELS), interpolation=cv2.INTER_LINEAR)


def photo_views(photos: np.ndarray, views: int) -> list[tuple[int, int]]:
    """(photo, view) pairs in the order of the cache; view 0 is the unchanged photo."""
    return [(photo, view) for view in range(views) for photo in range(len(photos))]


def make_view(photos: np.ndarray, photo: int, view: int, seed: int) -> np.ndarray:
    """View 0 is the photo itself. Other views are random, but the same every time."""
    return photos[photo] if view == 0 else view_of(photos[photo], np.random.default_rng((seed, view, photo)))


def run(work: Workspace) -> None:
    """Writes frozen-{train,unlabelled,labelled}: float16 [views * photos, 14, 14, 80]."""
    net = channels_last(pretrained_lite0().to(torch.bfloat16))
    sizes = {}
    for seed, (part, views) in enumerate(VIEWS.items()):
        photos = work.array(f"photos-{part}")
        pairs = photo_views(photos, views)
        maps = work.new_array(f"frozen-{part}", (len(pairs), 14, 14, FROZEN_CHANNELS), np.float16)
        for rows in blocks(f"views of {part}", len(pairs), BATCH):
            pixels = np.stack([make_view(photos, photo, view, seed) for photo, view in pairs[rows]])
            with torch.inference_mode():
                features = net.frozen(torch.from_numpy(pixels))
            maps[rows] = features.permute(0, 2, 3, 1).to(torch.float16).numpy()
        sizes[part] = len(pairs)
    work.finish(NAME, sizes)
