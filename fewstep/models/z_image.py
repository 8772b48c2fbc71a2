"""Z-Image: a single-stream transformer that reads text and picture in one sequence, on Qwen3 (ZImagePipeline)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.models.backbone import Backbone, away_from, chat_opening, filled

TOKENS = 512  # the stock pipeline's default, the chat template's own tokens included
SIZE = 1024  # pixels along an edge, the stock pipeline's default


class ZImage(Backbone):
    """The network counts time upwards from noise, (1000 - timestep) / 1000, and predicts x0 - eps: flow with the sign turned.

    Its pipeline's guidance is cond + s (cond - uncond): guidance w here is s = w - 1 there, and no guidance is s = 0.
    """

    pipeline = ZImagePipeline
    text_parts = ("text_encoder", "tokenizer")
    time_module = "t_embedder"
    lora_targets: ClassVar[list[str]] = [
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ]  # fmt: skip
    default_guidance = 5.0  # the card's 4, counted as here
    student_call: ClassVar[dict[str, Any]] = {"guidance_scale": 0.0}

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        """Prompts differ in length: `mask` (1, n) is one where there is text."""
        (text,), _ = self.pipe.encode_prompt(prompt, self.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        return {"prompt_embeds": text[None], "mask": torch.ones(1, len(text), dtype=torch.long, device=text.device)}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.model.config.cap_feat_dim), "mask": (TOKENS,)}

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        # each text in its own length: the network fills it up to a multiple of 32 with a learned token, and attends to that
        texts = list(cond["prompt_embeds"])
        if filled(cond["mask"]):
            texts = [text[:length] for text, length in zip(texts, cond["mask"].sum(1).tolist(), strict=True)]
        rows = model(list(xt.unsqueeze(2)), (1000 - timestep) / 1000, texts, return_dict=False)[0]  # pictures of one frame
        return -torch.stack(rows).squeeze(2)

    def middle(self, model: nn.Module) -> nn.Module:
        return model.layers[len(model.layers) // 2]

    def image_part(self, output: Any, xt: Tensor) -> Tensor:
        """The first tokens, one for each 2 x 2 latents; filling and text follow."""
        height, width = (n // 2 for n in xt.shape[-2:])
        return output[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def longest_text(self) -> tuple[Any, int]:
        return self.pipe.tokenizer, TOKENS - chat_opening(self.pipe.tokenizer, enable_thinking=True)

    def size_step(self) -> int:
        return 2 * self.pixels_per_latent()

    def size_limit(self) -> tuple[int, int]:
        _, rows, columns = self.model.config.axes_lens
        return rows * self.size_step(), columns * self.size_step()

    def default_size(self) -> tuple[int, int]:
        return SIZE, SIZE

    def teacher_call(self, guidance: float, negative_prompt: str = "") -> dict[str, Any]:
        return {"guidance_scale": guidance - 1} | away_from(negative_prompt)
