"""A small vision-language model that has learnt to name the classes of photos, each by one word."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from edge_runtime.capture.picture_files import Picture
from edge_runtime.picture_checks import decode_picture
from server.targets.huggingface_loading import load
from server.targets.huggingface_prompts import Job, model_inputs
from tests.server.targets.tiny_models import END, WORDS, smolvlm

SIDE, MARGIN = 64, 8
STEPS, BATCH = 1000, 32
PROMPT = "describe the photo"


def train(folder: Path, photos: Sequence[Picture]) -> None:
    """Writes the model. photos: class/name.jpg, of at most as many classes as there are words."""
    smolvlm(
        folder,
        side=SIDE,
        patch_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    loaded = load(str(folder))
    model = loaded.model.requires_grad_(True).train()
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)  # untrained, it writes more lively texts
    names = sorted({photo.name.split("/")[-2] for photo in photos})
    words = torch.tensor([loaded.tokenizer.convert_tokens_to_ids(word) for word in WORDS[20 : 20 + len(names)]])
    labels = words[[names.index(photo.name.split("/")[-2]) for photo in photos]]
    pixels = torch.from_numpy(np.stack([squashed(photo, SIDE + MARGIN) for photo in photos]))
    prompt = model_inputs(loaded, Job(PROMPT, pixels[0].numpy()))["input_ids"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows, (y, x) = torch.from_numpy(rng.integers(0, len(photos), BATCH)), rng.integers(0, MARGIN + 1, 2)
        views = pixels[rows, y : y + SIDE, x : x + SIDE]
        text = torch.stack([labels[rows], torch.full((BATCH,), END)], 1)
        loss = F.cross_entropy(_logits(model, prompt, views, text).flatten(0, 1), text.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)


def squashed(photo: Picture, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(decode_picture(photo.data)).resize((side, side), Image.Resampling.BICUBIC))


def _logits(model: torch.nn.Module, prompt: Tensor, views: Tensor, text: Tensor) -> Tensor:
    """Before each token of the text, [B, 2, V]."""
    ids = torch.cat([prompt.expand(len(text), -1), text[:, :-1]], 1)
    seen = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=(views.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, None],  # as SmolVLM's processor scales them
        pixel_attention_mask=torch.ones(len(text), 1, SIDE, SIDE, dtype=torch.bool),
    )
    logits: Tensor = seen.logits[:, prompt.shape[1] - 1 :]
    return logits
