"""HPSv2 and HPSv2.1: human preference by a CLIP ViT-H/14 (Wu et al., arXiv 2306.09341)."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fewstep.rewards.clip import CLIPScore
from fewstep.rewards.pixels import Preprocess, normalise, resize_float


def preprocess(images: Tensor, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), as the published scores are made (hpsv2 1.2.0, torchvision of 0.17 or later).

    The whole picture is seen: its longer edge is brought to `size`, and black fills the rest evenly on both sides, the odd pixel
    below or to the right. The picture is turned into floats first, so that the resize is neither rounded nor clipped.
    """
    height, width = longer_edge(*images.shape[2:], size)
    if (height, width) != images.shape[2:]:
        images = resize_float(images, height, width)
    top, left = (size - height) // 2, (size - width) // 2
    return normalise(F.pad(images, (left, size - width - left, top, size - height - top)), mean, std)


def longer_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) whose longer edge is `size`, the shorter one rounded, a half to the even number."""
    scale = size / max(height, width)
    return round(height * scale), round(width * scale)


STRAIGHT = str.maketrans(dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"'))
TYPESET = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\uff01-\uffef]")  # ligatures, full and half width
UNSEEN = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")  # control characters


def cleaned(prompt: str) -> str:
    """A prompt as the published tokenizer, open_clip's, cleans it before it splits it into words: HTML's entities and ligatures written
    out, quotes straight, letters of one width, no control characters. Blanks and case are left to the tokenizer, which does the same.

    What was once decoded by a wrong table ("schÃ¶n"), which is mended there, is read as it stands.
    """
    prompt = UNSEEN.sub("", html.unescape(html.unescape(prompt)))
    return TYPESET.sub(lambda found: unicodedata.normalize("NFKC", found[0]), prompt).translate(STRAIGHT)


class HPS(CLIPScore):
    """The cosine itself, as the published `score` returns it; its tables show 100 times that.

    Read from the folder that `fewstep convert-reward hps` makes of the published open_clip state dict. To open_clip "<|endoftext|>" in a
    prompt is text as any other, where a transformers CLIP's text would end there. Its own "<end_of_text>" is read as it stands.
    """

    reading: ClassVar[dict[str, Any]] = {"split_special_tokens": True}

    @property
    def scale(self) -> float:
        return 1.0

    def text_features(self, prompts: list[str]) -> Tensor:
        """As a CLIPScore's, of the cleaned prompts."""
        return super().text_features([cleaned(prompt) for prompt in prompts])

    @classmethod
    def read_preprocess(cls, folder: Path, size: int, kind: str = "CLIP") -> partial[Tensor]:
        published = super().read_preprocess(folder, size, kind)
        assert isinstance(published, Preprocess)
        return partial(preprocess, size=size, mean=published.mean, std=published.std)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an open_clip CLIP with the names and layout of a transformers CLIPModel.

    Raises ValueError for a tensor that has no place there.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":  # the causal mask, which old versions kept
            continue
        tower, inside = ("vision_model", name.removeprefix("visual.")) if name.startswith("visual.") else ("text_model", name)
        if inside in TRANSPOSED:
            renamed[TRANSPOSED[inside]] = value.T.contiguous()
        elif (tower, inside) in WHOLE:
            renamed[WHOLE[tower, inside]] = value
        elif inside.startswith("transformer.resblocks."):
            layer, _, part = inside.removeprefix("transformer.resblocks.").partition(".")
            block, _, kind = part.replace("in_proj_", "in_proj.").rpartition(".")
            if block == "attn.in_proj":
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{tower}.encoder.layers.{layer}.self_attn.{which}_proj.{kind}"] = third.contiguous()
            elif block in BLOCK:
                renamed[f"{tower}.encoder.layers.{layer}.{BLOCK[block]}.{kind}"] = value
            else:
                raise ValueError(f"not an open_clip CLIP: it has {name!r}")
        else:
            raise ValueError(f"not an open_clip CLIP: it has {name!r}")
    return renamed


# open_clip's names -> CLIPModel's
TRANSPOSED = {"proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
WHOLE = {
    ("text_model", "logit_scale"): "logit_scale",
    ("text_model", "positional_embedding"): "text_model.embeddings.position_embedding.weight",
    ("text_model", "token_embedding.weight"): "text_model.embeddings.token_embedding.weight",
    ("text_model", "ln_final.weight"): "text_model.final_layer_norm.weight",
    ("text_model", "ln_final.bias"): "text_model.final_layer_norm.bias",
    ("vision_model", "positional_embedding"): "vision_model.embeddings.position_embedding.weight",
    ("vision_model", "class_embedding"): "vision_model.embeddings.class_embedding",
    ("vision_model", "conv1.weight"): "vision_model.embeddings.patch_embedding.weight",
    ("vision_model", "ln_pre.weight"): "vision_model.pre_layrnorm.weight",  # transformers' spelling
    ("vision_model", "ln_pre.bias"): "vision_model.pre_layrnorm.bias",
    ("vision_model", "ln_post.weight"): "vision_model.post_layernorm.weight",
    ("vision_model", "ln_post.bias"): "vision_model.post_layernorm.bias",
}
BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
