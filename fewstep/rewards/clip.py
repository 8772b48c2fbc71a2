"""CLIPScore and PickScore: how well a picture fits its prompt, by a `transformers.CLIPModel`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.rewards.base import PixelReward
from fewstep.types import Sample, Signal

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json keeps them


class CLIPScore:
    """100 x cosine of image and text features (Hessel et al., arXiv 2104.08718), not clipped at zero: its gradient never dies.

    model: frozen and put into float32 and eval mode. mean, std: three numbers each, of the pixels in [0, 1].
    resample: how pictures of another size are brought to the model's.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, mean: list[float], std: list[float], *, resample: str = "bilinear"
    ):
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer, self.resample = tokenizer, resample
        self.size = int(model.config.vision_config.image_size)
        self.mean, self.std = (torch.tensor(x, device=model.device).view(3, 1, 1) for x in (mean, std))

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> CLIPScore:
        """Read a folder with a CLIPModel, its tokenizer and its preprocessing (preprocessor_config.json, or processor_config.json
        as transformers 5 writes it). Raises ValueError naming what is missing."""
        from transformers import AutoTokenizer, CLIPModel

        path = Path(folder) / "processor_config.json"
        if not path.is_file():
            path = path.with_name("preprocessor_config.json")
        try:
            config: dict[str, Any] = json.loads(path.read_text())
            config = config.get("image_processor", config)
            mean, std, resample = config["image_mean"], config["image_std"], RESAMPLE[config.get("resample", 2)]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        except KeyError as error:
            raise ValueError(f"{path}: needs image_mean, image_std and a resample of 2 or 3 (or none); stumbled over {error}") from error
        model = CLIPModel.from_pretrained(folder, use_safetensors=True).to(device)
        return cls(model, AutoTokenizer.from_pretrained(folder), mean, std, resample=resample)

    @property
    def scale(self) -> float:
        """What the cosine is multiplied by."""
        return 100.0

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised: the shorter edge resized, the centre kept, as CLIP does."""
        height, width = images.shape[2:]
        short = min(height, width)
        if short != self.size:
            height, width = height * self.size // short, width * self.size // short
            images = F.interpolate(images, (height, width), mode=self.resample, antialias=True, align_corners=False)
            images = images.clamp(0, 1)  # bicubic overshoots; 8-bit pictures, which the model was trained on, cannot
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return (images[:, :, top : top + self.size, left : left + self.size] - self.mean) / self.std

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, d) of unit length, differentiable in the pixels."""
        images = images.to(self.model.device, torch.float32)
        return F.normalize(self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output, dim=1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """B prompts -> (B, d) of unit length, without gradient. Each different prompt is encoded once."""
        unique = list(dict.fromkeys(prompts))
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(unique, padding=True, truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        number = {prompt: i for i, prompt in enumerate(unique)}
        return F.normalize(output.pooler_output, dim=1)[[number[prompt] for prompt in prompts]]

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """scale x cosine of each picture and its own prompt, (B,), differentiable in the pixels."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(1)

    def __call__(self, sample: Sample) -> Signal:
        return PixelReward(self.score, type(self).__name__)(sample)


class PickScore(CLIPScore):
    """exp(logit_scale) x cosine of a CLIPModel trained on preferences (Kirstain et al., arXiv 2305.01569)."""

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())
