"""LAION's aesthetic predictor: a linear head on the image features of CLIP ViT-L/14; prompts play no part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.rewards.base import PixelReward
from fewstep.rewards.clip import CLIPScore, read_config
from fewstep.rewards.files import check_safetensors, clip_of, fetch, read_model
from fewstep.rewards.pixels import Preprocess
from fewstep.types import Sample, Signal

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

LAYERS = (0, 2, 4, 6, 7)  # the linear ones of the published Sequential; dropout stands between them, no nonlinearity


class Aesthetic:
    """The published `sac+logos+ava1-l14-linearMSE` head on image features of unit length; about 1 .. 10.

    head: its tensors, `layers.N.weight` and `layers.N.bias`.
    """

    def __init__(self, vision: CLIPVisionModelWithProjection, head: dict[str, Tensor], preprocess: Preprocess):
        self.vision = vision.float().eval().requires_grad_(False)
        self.head = {name: value.to(vision.device, torch.float32) for name, value in check_head(head, vision.config.projection_dim).items()}
        self.preprocess = preprocess

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Aesthetic:
        """Read the folder that `fewstep convert-reward aesthetic` made, and the CLIP that it names.

        Raises ValueError naming what is missing or, among the weights, not these models'.
        """
        from safetensors.torch import load_file
        from transformers import CLIPVisionModelWithProjection

        named = clip_of(Path(folder))
        if named is None:
            raise ValueError(f"{folder}: no reward.json that names its CLIP; give the folder that `fewstep convert-reward aesthetic` made")
        clip = fetch(named)
        size = int(read_config(clip / "config.json").get("vision_config", {}).get("image_size", 224))
        check_safetensors(folder)
        head = load_file(Path(folder) / "model.safetensors")
        preprocess = CLIPScore.read_preprocess(clip, size)._replace(halves="even")  # it was published with torchvision's centre
        vision = read_model(CLIPVisionModelWithProjection, clip, more=True).to(device)  # the text's half is not read
        return cls(vision, head, preprocess)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,), differentiable in the pixels (B, 3, H, W)."""
        images = images.to(self.vision.device, torch.float32)
        features = F.normalize(self.vision(pixel_values=self.preprocess(images)).image_embeds, dim=1)
        for n in LAYERS:
            features = F.linear(features, self.head[f"layers.{n}.weight"], self.head[f"layers.{n}.bias"])
        return features[:, 0]

    def __call__(self, sample: Sample) -> Signal:
        return PixelReward(self.score, "Aesthetic")(sample)


def check_head(state: dict[str, Tensor], width: int | None = None) -> dict[str, Tensor]:
    """The head's tensors as they are. width: that of the CLIP's features. Raises ValueError when they are of another head."""
    wanted = {f"layers.{n}.{kind}" for n in LAYERS for kind in ("weight", "bias")}
    if state.keys() != wanted:
        odd = ", ".join(sorted(state.keys() ^ wanted)[:4])
        raise ValueError(f"not the linear head (layers {', '.join(map(str, LAYERS))} of weight and bias): missing or unknown {odd}")
    outputs = None
    for n in LAYERS:
        weight, bias = state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]
        if weight.ndim != 2 or outputs not in (None, weight.shape[1]) or bias.shape != weight.shape[:1]:
            shapes = f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}"
            raise ValueError(f"not the linear head: layers.{n} has {shapes}" + f" after {outputs} outputs" * (outputs is not None))
        outputs = len(weight)
    if outputs != 1:
        raise ValueError(f"not the linear head: it ends in {outputs} numbers, not in one score")
    read = state[f"layers.{LAYERS[0]}.weight"].shape[1]
    if width is not None and read != width:
        raise ValueError(f"the head reads {read} features, but its CLIP has {width}: it belongs to another CLIP")
    return state
