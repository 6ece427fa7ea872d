"""Small models of many architectures with random weights, as folders that transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCE = (
    "a the dog cat man woman is on in with red blue grass ball running sitting black white and two beach tree child "
    "water snow street bike horse photo describe one sentence what unusual here this jumps over stands near small big "
    "old young plays wears hat shirt"
)
WORDS = SENTENCE.split(" ")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SMOLVLM_MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
VOCABULARY = 320
END = 2
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SQUARE = {"height": 32, "width": 32}

Folder = Callable[[Path], None]


def words(special: tuple[str, ...] = (), **named: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, for which text and tokens are one to one."""
    every = [*SPECIAL, *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*every, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(every)
    return _fast(tokenizer, {k: v for k, v in {"image_token": "<image>", **named}.items() if v})


def byte_pairs(space: str) -> PreTrainedTokenizerFast:
    """A tokenizer that merges across letters and spaces: "bytes" as GPT-2's, "metaspace" as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if space == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    # So often that each word becomes one token, whatever is in front of it.
    tokenizer.train_from_iterator([" ".join(WORDS), " ".join(reversed(WORDS))] * 10 + ["A."], trainer)
    return _fast(tokenizer, {"image_token": "<image>"})


def _fast(tokenizer: Tokenizer, named: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def language_model(kind: str, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> Folder:
    """A causal language model; kind: of transformers' configuration class."""
    tokenizer = tokenizer or words()

    def save(folder: Path) -> None:
        config = getattr(transformers, f"{kind}Config")(**{**TEXT, **settings})
        _save_model(folder, config, transformers.AutoModelForCausalLM, tokenizer)
        tokenizer.save_pretrained(folder)

    return save


def smolvlm(folder: Path, kind: str = "SmolVLM", side: int = 32, **vision: int) -> None:
    """side: of a picture, in pixels; one token for 2 x 2 patches. vision: other sizes of the tower."""
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**VISION, "image_size": side, **vision},
        scale_factor=2,
        image_token_id=4,
        pad_token_id=0,
    )
    picture = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": side}, max_image_size={"longest_edge": side}, do_image_splitting=False
    )
    tokenizer = words(SMOLVLM_MARKS)
    tokens = (side // config.vision_config.patch_size // 2) ** 2
    _save(folder, config, f"{kind}Processor", picture, tokenizer, "<image>", image_seq_len=tokens)


def idefics3(folder: Path) -> None:
    smolvlm(folder, "Idefics3")


def llava(folder: Path) -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 2}),
        image_token_index=4,
    )
    picture = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _save(folder, config, "LlavaProcessor", picture, words(), **settings)


def paligemma(folder: Path) -> None:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**VISION, projection_dim=32),
        image_token_index=4,
        projection_dim=32,
        hidden_size=32,
    )
    picture = transformers.SiglipImageProcessorPil(size=SQUARE, image_seq_length=16)
    _save(folder, config, "PaliGemmaProcessor", picture, words())


def blip(folder: Path) -> None:
    text = {**TEXT, "encoder_hidden_size": 32, "projection_dim": 32, "sep_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    _save(folder, config, "BlipProcessor", transformers.BlipImageProcessorPil(size=SQUARE), words())


def blip2(folder: Path) -> None:
    inner = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**TEXT, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config={**inner, "encoder_hidden_size": 32}, text_config=text, num_query_tokens=4
    )
    config.image_token_id = config.image_token_index = 4
    picture = transformers.BlipImageProcessorPil(size=SQUARE)
    _save(folder, config, "Blip2Processor", picture, words(image_token=None), num_query_tokens=4)


def florence2(folder: Path) -> None:
    text = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
        "max_position_embeddings": 256,
    }
    vision = {
        "embed_dim": [8, 8, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "window_size": 2,
        "projection_dim": 32,
        "patch_size": [3, 3, 3, 3],
        "patch_stride": [2, 2, 2, 2],
        "patch_padding": [1, 1, 1, 1],
    }
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=4)
    picture = transformers.CLIPImageProcessorPil(size=SQUARE, do_center_crop=False, image_seq_length=5)
    _save(folder, config, "Florence2Processor", picture, words(), num_additional_image_tokens=0)


def internvl(folder: Path) -> None:
    marks = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=7,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    picture = transformers.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    named = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokenizer = words(marks, **dict(zip(named, marks, strict=True)))
    _save(folder, config, "InternVLProcessor", picture, tokenizer, "<IMG_CONTEXT>", image_seq_length=4)


def qwen2_vl(folder: Path) -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "mlp_ratio": 1,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    picture = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 1024}
    )
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = words(marks, image_token=marks[0], video_token=marks[1])
    _save(folder, config, "Qwen2VLProcessor", picture, tokenizer, "<|vision_start|> <|image_pad|> <|vision_end|>")


def _save(
    folder: Path, config: Any, processor: str, picture: Any, tokenizer: Any, mark: str = "", **settings: Any
) -> None:
    """mark: of a picture in a chat template; without one there is no template."""
    _save_model(folder, config, transformers.AutoModelForImageTextToText, tokenizer)
    picture.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor, **settings}))
    if mark:
        part = f"{{% if part['type'] == 'image' %}}{mark} {{% else %}}{{{{ part['text'] }}}} {{% endif %}}"
        (folder / "chat_template.jinja").write_text(
            "{% for message in messages %}{% for part in message['content'] %}" + part + "{% endfor %}{% endfor %}"
        )


def _save_model(folder: Path, config: Any, kind: Any, tokenizer: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind.from_config(config)
        for weight in model.parameters():
            if weight.ndim > 1:  # else the same word is written again and again
                torch.nn.init.normal_(weight, std=0.3)
    others = never_written(tokenizer)
    model.generation_config.suppress_tokens = others
    model.generation_config.eos_token_id = END
    if hasattr(model, "text_decoder"):  # BLIP writes with an inner model, whose generation settings are not saved
        model.text_decoder.cls.predictions.bias.data[others] = -100.0
    model.save_pretrained(folder)


def never_written(tokenizer: Any) -> list[int]:
    """All but whole words and the end: as of a trained model, no text has special tokens, or words spelt in parts."""
    words = {ids[0] for word in WORDS if len(ids := tokenizer.encode(f" {word}", add_special_tokens=False)) == 1}
    return sorted(set(range(VOCABULARY)) - words - {END})


LANGUAGE_MODELS: dict[str, Folder] = {
    "llama": language_model("Llama", byte_pairs("metaspace")),
    "qwen2": language_model("Qwen2", byte_pairs("bytes")),
    "gpt2": language_model("GPT2", byte_pairs("bytes"), n_embd=32, n_layer=2, n_head=2, n_positions=256),
    "mistral-sliding-window": language_model("Mistral", sliding_window=8),
    "lfm2-convolution": language_model("Lfm2", layer_types=["conv", "full_attention"]),
    "gemma3-hybrid-window": language_model("Gemma3Text", sliding_window=8, head_dim=8, num_hidden_layers=6),
}
VISION_MODELS: dict[str, Folder] = {
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "llava": llava,
    "paligemma": paligemma,
    "blip": blip,
    "florence2": florence2,
    "internvl": internvl,
    "qwen2-vl": qwen2_vl,
}
