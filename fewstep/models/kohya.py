"""LoRA weights under the names of kohya's trainer, which ComfyUI and the web UIs read.

In it the layers of Stable Diffusion 1.x / 2.x keep diffusers' names, those of Stable Diffusion XL have the original (sgm) code's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor

from fewstep.disk import replace

OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
IN_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
PART = {"resnets": 0, "attentions": 1}  # of a place


def sgm_name(layer: str, config: Any) -> str:
    """A UNet2DConditionModel's layer under its name in the original code; config: the UNet's.

    There the blocks of a side are one list of places: `layers_per_block` and a downsampler for each block on the way down (after
    conv_in, place 0), one more layer on the way up, where the upsampler shares the last place. Raises ValueError for a layer
    that the original code does not have.
    """
    if layer in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[layer]
    count = config.layers_per_block + 1  # places of a block
    match layer.split("."):
        case ["down_blocks", block, "downsamplers", "0", "conv"]:
            return f"input_blocks.{count * (int(block) + 1)}.0.op"
        case ["up_blocks", block, "upsamplers", "0", "conv"]:
            part = 2 if "Attn" in config.up_block_types[int(block)] else 1
            return f"output_blocks.{count * (int(block) + 1) - 1}.{part}.conv"
        case [("down_blocks" | "up_blocks") as side, block, ("resnets" | "attentions") as kind, index, *inside]:
            number = count * int(block) + int(index)
            place = f"input_blocks.{1 + number}" if side == "down_blocks" else f"output_blocks.{number}"
            place += f".{PART[kind]}"
        case ["mid_block", ("resnets" | "attentions") as kind, index, *inside]:
            place = f"middle_block.{2 * int(index) + PART[kind]}"
        case _:
            raise ValueError(f"{layer}: the original code has no such layer, so kohya's format has no name for it")
    return f"{place}.{IN_RESNET['.'.join(inside)] if kind == 'resnets' else '.'.join(inside)}"


def to_kohya(layers: dict[str, Tensor], config: Any, *, names: str) -> dict[str, Tensor]:
    """LoRA weights by `LAYER.lora_A.weight` and `LAYER.lora_B.weight` -> kohya's keys, with an alpha, the rank, for each layer.

    names: "diffusers" or "sgm", whose names the format has for the layers of this network.
    """
    if names == "sgm":
        parted = {key: key.partition(".lora_") for key in layers}
        layers = {f"{sgm_name(layer, config)}{mark}{rest}": layers[key] for key, (layer, mark, rest) in parted.items()}
    keys = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in layers.items()})
    dtype = next(iter(layers.values())).dtype
    return {key: value.to(dtype) for key, value in keys.items()}  # the alphas too, which kohya saves so and diffusers makes int64


def from_kohya(keys: dict[str, Tensor], pipeline: Any, config: Any) -> dict[str, Tensor]:
    """What the stock pipeline's `load_lora_weights` makes of kohya's keys: LoRA weights by the names that `to_kohya` takes."""
    found, _ = pipeline.lora_state_dict(dict(keys), unet_config=config)
    return convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in found.items()})


def metadata(rank: int, version: str | None, title: str) -> dict[str, str]:
    """What kohya's trainer writes into its files and other tools sort them by. version: of the base model, None: not one it knows."""
    known = {} if version is None else {"ss_base_model_version": version, "ss_v2": str("_v2" in version)}
    return known | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(rank)}),
        "modelspec.title": title,
    }


def save(backbone: Any, weights: dict[str, Tensor], path: Path, *, rank: int, title: str) -> None:
    """Write the student's LoRA as one file in kohya's format.

    Raises ValueError where the format has no name for a layer, and when diffusers would not read every weight back as it is.
    """
    layers, config = backbone.lora_layers(weights), backbone.model.config
    keys = to_kohya(layers, config, names=backbone.kohya)
    back = from_kohya(keys, backbone.pipeline, config)
    lost = [name for name in layers if name not in back or not torch.equal(layers[name], back[name])]
    if lost or len(back) != len(layers):
        raise ValueError(f"diffusers does not read {len(lost)} of {len(layers)} weights back from kohya's format, the first: {lost[:1]}")
    made, told = {name: value.contiguous() for name, value in keys.items()}, metadata(rank, backbone.kohya_version(), title)
    replace(path, lambda temporary: save_file(made, temporary, told))
