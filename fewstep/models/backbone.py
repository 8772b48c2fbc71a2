"""What the families share: three roles on one network, prompts to conditions, and a student that stock diffusers opens.

A family is a subclass that says what its stock pipeline does in one denoising step; nothing else knows a family by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fewstep import hub
from fewstep.denoiser import SCALE, Cond, Denoiser, Prediction, join
from fewstep.disk import give_usual_mode, is_one, replace_text
from fewstep.launch import put_back
from fewstep.models import (
    KEPT_GUIDANCE,
    PICKLES,
    UnsupportedTeacher,
    check_weights,
    in_pickles,
    index_of,
    is_null,
    of_variant,
    stored_packed,
    with_range,
)
from fewstep.models.embeddings import Embeddings
from fewstep.models.lora import Adapters, AddedLinear, merged
from fewstep.models.schedulers import check_betas, flow_scheduler, lcm_scheduler
from fewstep.schedule import DDPM, Flow, Schedule

TRACES = 64  # of one block's function that torch may keep
TOKENIZED = 1024  # prompts that a tokenizer is given at once
KEPT = (".json", ".txt", ".model", ".jinja", ".safetensors")  # files of a part that a student has from its teacher as they are
FEW_STEP = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")  # of teachers distilled to few steps alone


class Roles(NamedTuple):
    """The three denoisers of a run, and the parameters that the two trained ones own."""

    teacher: Denoiser
    student: Denoiser
    fake: Denoiser
    student_parameters: dict[str, nn.Parameter]
    fake_parameters: dict[str, nn.Parameter]


def attention_backends() -> list[SDPBackend]:
    """The attention kernels that are allowed here."""
    cuda = torch.backends.cuda
    allowed = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [backend for backend, enabled in allowed.items() if enabled]


@contextmanager
def attention() -> Iterator[None]:
    """The attention kernels of one pass of a network: where a gradient is recorded, all that are allowed but cuDNN's.

    Its forward pass is the fastest on an H100, its backward pass is not to be trusted: with torch 2.11 it ended FLUX.1's first update
    in an illegal memory access, and gives NaN under some masks (pytorch issue 196678).
    """
    if not torch.is_grad_enabled() or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    with sdpa_kernel([backend for backend in attention_backends() if backend != SDPBackend.CUDNN_ATTENTION]):
        yield


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network is a stack of: those that diffusers names, else the entries of the lists that it holds."""
    names = set(model._repeated_blocks or ())
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    return [block for held in model.children() if isinstance(held, nn.ModuleList) for block in held]


class Again(ExitStack):
    """What a block is computed again under: the adapter, and the attention kernels, that it was first computed with.

    Entered anew for each backward pass through it: rewards share the graph of a picture.
    """

    def __init__(self, adapters: Adapters | None):
        super().__init__()
        self.adapters, self.adapter, self.kernels = adapters, adapters.on if adapters else None, attention_backends()

    def __enter__(self) -> Again:
        if self.adapters and self.adapter is not None:
            self.adapters.switch(self.adapter)
        self.enter_context(sdpa_kernel(self.kernels))
        return self


def recompute(adapters: Adapters | None) -> Callable[..., Any]:
    """A checkpoint function for diffusers' blocks. By the time of the backward pass another role may have used the base."""

    def run(block: Callable[..., Any], *args: Any) -> Any:
        again = Again(adapters)
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

    return run


class Network(nn.Module):
    """A family's network called as `network(xt, timestep, cond)`, with the student's step as an extra condition when asked for.

    The step is an embedding added to the time embedding, zero at the start.
    adapters, adapter: the base's LoRA layers and the adapter to switch on for the call; "" switches all off.
    guidance: the scale that the network is told in every call; "each": its conditions tell one for each sample; None: it is told none.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: nn.Module,
        *,
        steps: int = 0,
        adapters: Adapters | None = None,
        adapter: str = "",
        guidance: float | Literal["each"] | None = None,
    ):
        super().__init__()
        self.model, self.adapters, self.adapter, self.guidance = model, adapters, adapter, guidance
        self.backbone = [backbone]  # in a list: the backbone is no part of the network
        self.step_embedding = None
        if steps:
            self.step_embedding = nn.Embedding(steps, backbone.time_width(model))
            nn.init.zeros_(self.step_embedding.weight)

    def forward(self, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        self.switch()
        if self.guidance is None:  # the teacher of a student that is told: it is guided from outside
            cond = {key: value for key, value in cond.items() if key not in SCALE}
        elif self.guidance != "each":
            cond = {**cond, "guidance": torch.full((len(xt),), self.guidance, device=xt.device)}
        elif "guidance" not in cond:
            raise ValueError("this network is told a guidance scale, and its conditions have none: encode prompts with one")
        with self.add_step(cond), attention():
            return self.backbone[0].predict(self.model, xt, timestep, cond)

    def features(self, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """Output of the network's middle, (B, F, h, w); of a transformer the tokens, (B, F, n, 1)."""
        taken: list[Any] = []
        handle = self.backbone[0].middle(self.model).register_forward_hook(lambda module, args, output: taken.append(output))
        try:
            self(xt, timestep, cond)
        finally:
            handle.remove()
        output = self.backbone[0].image_part(taken[0], xt)
        return output if output.ndim == 4 else output.transpose(1, 2).unsqueeze(-1)

    def switch(self) -> None:
        """Turn this role's adapter on and the others off, or all off."""
        if self.adapters is not None:
            self.adapters.switch(self.adapter)

    @contextmanager
    def add_step(self, cond: Cond):
        if self.step_embedding is None:
            yield
            return
        extra = self.step_embedding(cond["step"])
        place = self.model.get_submodule(self.backbone[0].time_module)
        handle = place.register_forward_hook(lambda module, args, output: output + extra.to(output))
        try:
            yield
        finally:
            handle.remove()


def in_eight_bits(model: nn.Module) -> None:
    """The model's linear layers with 8-bit weights (torchao), in place. Raises ImportError naming what to install."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError('memory.teacher int8 needs torchao: pip install "fewstep[lowmem]"') from error
    quantize_(model, Int8WeightOnlyConfig())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(as_autocast)


def as_autocast(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A linear layer's inputs in autocast's number format, where it is on: it does not see that 8-bit weights are multiplied."""
    return tuple(x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x for x in args)


def unpadded(text: Tensor, mask: Tensor) -> Cond:
    """One prompt's text (1, n, width) and mask (1, n) without the padding, which a network with a mask does not see but computes."""
    kept = mask[0].bool()
    return {"prompt_embeds": text[:, kept], "mask": mask[:, kept]}


def chat_opening(tokenizer: Any, **options: Any) -> int:
    """Tokens of the chat template from its beginning to where the user's prompt stands. options: of the template."""
    mark = "PROMPT"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, **options)
    return len(tokenizer(chat[: chat.index(mark)]).input_ids)


def away_from(negative_prompt: str) -> dict[str, str]:
    """What a stock pipeline is told beside its guidance: nothing where it has an empty prompt of its own."""
    return {"negative_prompt": negative_prompt} if negative_prompt else {}


def filled(mask: Tensor) -> bool:
    """Whether a mask (B, n) leaves out anything; one without numbers, on the meta device, does not."""
    return mask.device.type != "meta" and not bool(mask.all())


def without_path(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the folder that it was read from, which diffusers and transformers write into it."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def read(pipeline: type[DiffusionPipeline], source: str, **options: Any) -> tuple[Any, str | None]:
    """(a stock pipeline, its files' variant); where parts have weights in bf16 or fp16 alone (`*.fp16.safetensors`), those, with a warning.

    Raises OSError where no variant is whole.
    """
    lacking: OSError
    for variant in (None, "bf16", "fp16"):
        try:
            pipe = pipeline.from_pretrained(source, variant=variant, **options)
        except OSError as error:  # a file is missing
            lacking = error
            continue
        except ValueError:  # diffusers': there are no such files
            if variant is None:
                raise
            continue
        if variant is not None:
            parts = [name for name, part in pipe.components.items() if isinstance(part, nn.Module) and of_variant(part, variant)]
            warnings.warn(
                f"{source}: not all of its weights are there in plain files, so {', '.join(parts)} were read from those in {variant}; the "
                "teacher is what is left of it in those numbers",
                stacklevel=4,
            )
        return pipe, variant
    raise lacking


def packed_network(source: str, part: str, kind: str) -> UnsupportedTeacher:
    """What to say of a network that is stored in 4 or 8 bits; kind: by whom, as "bitsandbytes"."""
    return UnsupportedTeacher(
        f"{source}: its {part} is stored in fewer bits ({kind}), and a student is made of its weights; give the model that it was made "
        "from (text encoders may be stored so)"
    )


class Backbone:
    """One teacher pipeline: encodes prompts, decodes latents, makes the three roles, exports the student."""

    pipeline: ClassVar[type[DiffusionPipeline]]
    load_options: ClassVar[dict[str, Any]] = {}  # of the pipeline's from_pretrained
    part: ClassVar[str] = "transformer"  # the pipeline's denoising network
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    can_lack: ClassVar[tuple[str, ...]] = ()  # of these: text encoders that the stock pipeline does without, and their tokenizers
    time_module: ClassVar[str]  # what makes the time embedding (B, width), to which a step's is added
    lora_targets: ClassVar[list[str]]
    flow: ClassVar[bool] = True  # else a DDPM schedule, prediction as the teacher's scheduler says
    embedded_guidance: ClassVar[float | None] = None  # guidance-distilled: the scale that the network is called with
    # the input by which the stock pipeline tells a network its scale: its "own", or one "added" to student and fake; None: it has no way
    scale_input: ClassVar[Literal["own", "added"] | None] = None
    empty: ClassVar[str] = ""  # the prompt of classifier-free guidance
    default_guidance: ClassVar[float]  # of the teacher's own pictures, as its model card has it
    student_call: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}  # what the stock pipeline needs to be told for no more guidance
    kohya: ClassVar[str | None] = None  # whose layer names kohya's LoRA format has for the family, "diffusers" or "sgm"; None: no format

    def __init__(self, pipe: DiffusionPipeline, source: str, *, cache: Path | None = None, device: torch.device | str = "cpu"):
        self.pipe, self.source, self.device = pipe, source, torch.device(device)
        self.prediction: Prediction = "flow"
        if not self.flow:
            check_betas(pipe.scheduler, source)
            kind = pipe.scheduler.config.get("prediction_type")
            if kind not in ("epsilon", "v_prediction", "sample"):
                raise UnsupportedTeacher(f"{source}: prediction_type {kind!r} in its scheduler is not one of epsilon, v_prediction, sample")
            self.prediction = kind
            self.check_schedule()
        if getattr(self.model, "is_quantized", False):
            raise packed_network(source, self.part, self.model.hf_quantizer.quantization_config.quant_method.value)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
                if part not in (*self.text_modules(), pipe.vae):  # those rest on the CPU until they are needed
                    part.to(self.device)
        self.embeddings = Embeddings(self.encode_on_device, self.text_fingerprint, cache)

    @classmethod
    def load(cls, source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, cache: Path | None = None) -> Backbone:
        """dtype: of the frozen parts. Raises UnsupportedTeacher with the path and the reason when a part is missing or damaged."""
        absent = cls.absent(index_of(source), source)
        name, revision = hub.split(source)
        try:
            pipe, variant = read(
                cls.pipeline, name, revision=revision, dtype=dtype, use_safetensors=True, **cls.load_options, **dict.fromkeys(absent)
            )
            check_weights(pipe, source, variant)
        except UnsupportedTeacher:
            raise
        except Exception as error:  # diffusers, transformers and safetensors raise many kinds; each means an unreadable teacher
            hint = f"; {PICKLES}" if isinstance(error, OSError) and in_pickles(source, error) else ""
            raise UnsupportedTeacher(
                f"{source}: cannot be read as a {cls.pipeline.__name__} ({type(error).__name__}: {error}){hint}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, source, cache=cache, device=device)

    @classmethod
    def absent(cls, index: dict[str, Any], source: str) -> list[str]:
        """The parts, of `can_lack`, that a teacher's model_index.json has as null: diffusers is to be told of them. A tokenizer goes with
        its encoder. Raises UnsupportedTeacher for any other part that has null there, or no entry at all."""
        parts = (cls.part, "vae", "scheduler", *cls.text_parts)
        null = [name for name in parts if is_null(index.get(name))]
        needed = {
            "null for": [name for name in null if name not in cls.can_lack or name.replace("tokenizer", "text_encoder") not in null],
            "no entry for": [name for name in parts if name not in index],
        }
        has = [f"{what} {', '.join(names)}" for what, names in needed.items() if names]
        if has:
            raise UnsupportedTeacher(
                f"{source}: its model_index.json has {' and '.join(has)}, and no student can be trained without; give a "
                f"{cls.pipeline.__name__} that has them all" + f" (only {', '.join(cls.can_lack)} may be null)" * bool(cls.can_lack)
            )
        return null

    def lacks(self) -> list[str]:
        """The parts, of `can_lack`, that this teacher comes without."""
        return [name for name in self.can_lack if getattr(self.pipe, name) is None]

    def check_schedule(self) -> None:
        """Raises UnsupportedTeacher for betas that LCM's scheduler lacks, and for a network that says nothing of x0 at t = 1."""
        try:
            signal = self.schedule().alpha(torch.ones(1))
        except (NotImplementedError, ValueError) as error:
            kind = self.pipe.scheduler.config.get("beta_schedule")
            raise UnsupportedTeacher(
                f"{self.source}: the beta_schedule {kind!r} in its scheduler is none that a student's can have ({error}); supported are "
                "linear, scaled_linear, squaredcos_cap_v2 and trained_betas"
            ) from error
        if self.prediction == "epsilon" and signal == 0:
            raise UnsupportedTeacher(
                f"{self.source}: its scheduler begins without any signal (rescale_betas_zero_snr, or trained_betas that end in 1), where "
                "the epsilon that its network predicts says nothing of the picture; correct prediction_type or the betas in "
                "scheduler/scheduler_config.json to what the network was trained with"
            )

    # -- what a family says ----------------------------------------------------------------------------------------

    def encode_one(self, prompt: str) -> Cond:
        """The conditions of one prompt as the stock pipeline makes them, each with a first dimension of 1."""
        raise NotImplementedError

    def as_negative(self, prompt: str) -> str:
        """What `encode_one` is given for a negative prompt, by which its conditions are kept too: the prompt itself, where the stock
        pipeline encodes both alike."""
        return prompt

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's conditions, without the first dimension, for a prompt as long as is read: by configurations alone."""
        raise NotImplementedError

    def predict(self, model: nn.Module, xt: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """One call of the network as the stock pipeline makes it: xt (B, C, H, W), native timestep (B,) -> prediction (B, C, H, W)."""
        raise NotImplementedError

    def middle(self, model: nn.Module) -> nn.Module:
        """The block whose output a discriminator looks at."""
        blocks = model.transformer_blocks
        return blocks[len(blocks) // 2]

    def image_part(self, output: Any, xt: Tensor) -> Tensor:
        """What the middle block says of the latents xt (B, C, H, W): tokens (B, n, F) or a map (B, F, h, w)."""
        return output if isinstance(output, Tensor) else output[-1]  # (text, image) of a two-stream block

    def longest_text(self) -> tuple[Any, int]:
        """(tokenizer, limit in tokens) of the text encoder that reads the most."""
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    def channels(self) -> int:
        return self.model.config.in_channels

    def pixels_per_latent(self) -> int:
        """Along an edge."""
        return self.pipe.vae_scale_factor

    def size_step(self) -> int:
        """Pixels that a picture's height and width are a multiple of."""
        return self.pixels_per_latent()

    def size_limit(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the largest picture that the network has positions for; None: it has them for any."""
        return None

    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the stock pipeline's pictures."""
        size = self.model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pixels_per_latent(), width * self.pixels_per_latent()

    def told_size(self, size: tuple[int, int] | None = None) -> dict[str, int]:
        """Height and width in pixels, as the stock pipeline is told them. size: (height, width), None for the teacher's own.

        Always told: not every stock pipeline draws at its network's own size when it is not.
        """
        return dict(zip(("height", "width"), size or self.default_size(), strict=True))

    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1], as the stock pipeline does; differentiable."""
        vae = self.decoder()
        latents = self.to_autoencoder(x0)
        return (vae.decode(latents.to(vae.dtype), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def check_decoder(self) -> None:
        """Decodes one small picture, before a training that may look at none. Raises ValueError where it holds NaN."""
        with self.on_device([self.pipe.vae]):
            picture = self.decode(torch.zeros(1, self.channels(), 8, 8, device=self.device))
        if bool(torch.isnan(picture).any()):
            raise ValueError("the pictures of its autoencoder hold NaN: look at the weights in its vae")

    def to_autoencoder(self, x0: Tensor) -> Tensor:
        """The network's latents (B, C, H, W) as the autoencoder has them."""
        config = self.pipe.vae.config
        return x0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        """The inverse of `to_autoencoder`."""
        config = self.pipe.vae.config
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the network's latents, which `decode` makes pictures of again: drawn from the autoencoder's
        posterior, as those are that a latent diffusion model learns. generator: of the draw."""
        vae = self.decoder()
        return self.from_autoencoder(vae.encode((2 * pictures - 1).to(vae.dtype)).latent_dist.sample(generator))

    def decoder(self) -> Any:
        """The autoencoder, on the device from now on: whoever decodes in training does so in every update."""
        return self.pipe.vae.to(self.device)

    def takes_guidance(self) -> bool:
        """Whether the teacher can be guided; one that is distilled to few steps may not."""
        return True

    def few_step_scheduler(self) -> str | None:
        """The teacher's scheduler in words where it is one of teachers distilled to few steps, which were not made to be guided; else None.

        SD-Turbo, SDXL-Turbo and SDXL-Lightning come with Euler's in trailing steps, where the models that they were made from have leading
        ones. SD3.5-large-turbo and Z-Image-Turbo say nothing of it.
        """
        kind, config = type(self.pipe.scheduler).__name__, self.pipe.scheduler.config
        if kind in FEW_STEP or config.get("stochastic_sampling"):
            return kind
        trailing = kind.startswith("Euler") and config.get("timestep_spacing") == "trailing" and self.prediction == "epsilon"
        return f"{kind} in trailing steps" if trailing else None

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the layout that the stock pipeline's loop holds them in."""
        return latents

    def to_call(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the layout that the stock pipeline's `latents=` takes."""
        return self.to_pipeline(latents)

    def scale_conditions(self, guidance: Tensor) -> Cond:
        """What tells a network its guidance scale (B,) float64, as the stock pipeline does; on the CPU."""
        return {"guidance": guidance}

    def add_scale_input(self, model: nn.Module) -> str:
        """Give a network that has none (`scale_input` "added") an input for its scale, of no effect as yet; the name of its layer."""
        raise NotImplementedError

    def name_scale_input(self, model: nn.Module, there: bool) -> None:
        """Whether the configuration has the input that was added: the stock pipeline then tells it the scale and adds no guidance."""

    def keeps_guidance(self) -> bool:
        """Whether this pipeline's network has an input for a scale that was added to it: it is a student's, with a range."""
        return False

    def student_told(self, guidance: float | None) -> dict[str, Any]:
        """What the stock pipeline is told for a student's pictures; guidance: the scale of one that keeps it as a knob, else None."""
        return self.student_call | ({} if guidance is None else {"guidance_scale": guidance})

    def teacher_call(self, guidance: float, negative_prompt: str = "") -> dict[str, Any]:
        """What the stock pipeline is told for the teacher's pictures under guidance `uncond + w (cond - uncond)`, away from a negative
        prompt ("": the family's empty one)."""
        return {"guidance_scale": guidance} | away_from(negative_prompt)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def text_modules(self) -> list[nn.Module]:
        parts = (getattr(self.pipe, name) for name in self.text_parts)
        return [part for part in parts if isinstance(part, nn.Module)]

    @contextmanager
    def on_device(self, modules: list[nn.Module]) -> Iterator[None]:
        """The modules on the device for as long as this lasts; those that rested on the CPU do so again afterwards."""
        moved = [module for module in modules if next(module.parameters()).device.type != self.device.type]
        for module in moved:
            module.to(self.device)
        try:
            yield
        finally:
            for module in moved:
                module.to("cpu")

    def encode_on_device(self, prompt: str) -> Cond:
        with self.on_device(self.text_modules()):
            return self.encode_one(prompt)

    def prepare(self, prompts: list[str], *, negative_prompt: str = "", sharers: int = 1) -> None:
        """Encode those of the prompts that the cache lacks, the empty one and a negative one too, with the text encoders on the device
        meanwhile.

        sharers: processes that do the same at once, each with a share of its own. On the CPU the encoders have nothing to make room for,
        and a prompt is encoded when it is first asked for.
        """
        if self.device.type == "cpu":
            return
        negative = [self.as_negative(negative_prompt)] if negative_prompt else []
        missing = self.embeddings.missing([*prompts, self.empty, *negative])
        if missing:
            with self.on_device(self.text_modules()):
                self.embeddings.fill(missing, sharers=sharers)

    def text_fingerprint(self) -> list[Any]:
        """What conditions depend on beside the prompt: the text encoders' and tokenizers' contents, the family's encoding."""
        return [type(self).__name__, *(getattr(self.pipe, name) for name in self.text_parts)]

    def encode(self, prompts: list[str], guidance: Tensor | None = None) -> Cond:
        """Text conditions, one row per prompt. Each prompt is encoded alone, so that its row does not depend on its batch.

        guidance (B,): scales that the networks are told beside, where they take one.
        """
        rows = {prompt: {key: value.to(self.device) for key, value in self.embeddings[prompt].items()} for prompt in dict.fromkeys(prompts)}
        cond = join([rows[prompt] for prompt in prompts])
        return cond if guidance is None else cond | self.scales_on_device(guidance)

    def scales_on_device(self, guidance: Tensor) -> Cond:
        # on the CPU, as in the stock pipeline: the sine of a scale times 1000 makes much of another device's rounding
        return {key: value.to(self.device) for key, value in self.scale_conditions(guidance.cpu().double()).items()}

    def random_conditions(self, n: int, guidance: Tensor | None = None) -> Cond:
        """Conditions as `encode` makes them of n long prompts, of random numbers: to measure with, without a text encoder."""
        make = {True: torch.ones, False: torch.randn}
        cond = {
            key: make["mask" in key](n, *shape, device=self.device, dtype=torch.long if "mask" in key else self.dtype)
            for key, shape in self.condition_shapes().items()
        }
        return cond if guidance is None else cond | self.scales_on_device(guidance)

    def cut(self, prompts: list[str]) -> list[str]:
        """Those of the prompts that are longer than the text encoder reads."""
        tokenizer, limit = self.longest_text()
        some = [prompts[i : i + TOKENIZED] for i in range(0, len(prompts), TOKENIZED)]  # together: a set may have millions
        return [prompt for part in some for prompt, ids in zip(part, tokenizer(part).input_ids, strict=True) if len(ids) > limit]

    # -- roles -------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        return getattr(self.pipe, self.part)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts, and of the student that is exported."""
        return next(self.pipe.vae.parameters()).dtype

    def time_width(self, model: nn.Module) -> int:
        """Width of the time embedding: the last linear layer of what makes it."""
        return [m for m in model.get_submodule(self.time_module).modules() if isinstance(m, nn.Linear)][-1].out_features

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture of `size` = (height, width) in pixels; None: the stock pipeline's own.

        Raises ValueError for a size that the family cannot draw.
        """
        height, width = size or self.default_size()
        edge, step = self.pixels_per_latent(), self.size_step()
        if height % step or width % step or height < step or width < step:
            raise ValueError(f"a picture of {type(self).__name__} measures a multiple of {step} pixels each way, got {height} x {width}")
        limit = self.size_limit()
        if limit and (height > limit[0] or width > limit[1]):
            raise ValueError(f"{self.source} has positions for pictures up to {limit[0]} x {limit[1]} pixels, got {height} x {width}")
        return self.channels(), height // edge, width // edge

    def scheduler(self, steps: int) -> Any:
        """The K-step scheduler that the student is exported with; its grid is the only list of training times."""
        config = dict(self.pipe.scheduler.config)
        return flow_scheduler(config, steps) if self.flow else lcm_scheduler(config, steps)

    @functools.cached_property
    def own_schedule(self) -> Schedule:
        return Flow() if self.flow else DDPM(self.scheduler(1).alphas_cumprod)  # made once: betas take diffusers a loop over the timesteps

    def schedule(self) -> Schedule:
        return self.own_schedule

    def times(self, steps: int) -> Tensor:
        """(K,) float64, decreasing from 1, read from the scheduler that is exported."""
        return self.schedule().t_of(self.scheduler(steps).timesteps.double().cpu())

    def denoiser(self, network: nn.Module, scale: float | None = None, *, negative_prompt: str = "") -> Denoiser:
        """scale: what an embedded guidance is told where nothing but the empty prompt is asked about; negative_prompt: what guidance leads
        away from instead of the empty one."""
        told = () if scale is None else (torch.tensor([scale]),)
        negative = self.encode([self.as_negative(negative_prompt)]) if negative_prompt else None
        return Denoiser(network, self.schedule(), self.prediction, uncond=self.encode([self.empty], *told), negative=negative)

    @classmethod
    def check_range(cls) -> None:
        """Raises ValueError where the stock pipeline has no way to tell a network its guidance scale."""
        if cls.scale_input is None:
            raise ValueError(
                f"a range needs a network that is told its scale, and a stock {cls.pipeline.__name__} tells none: give one scale; "
                f"families with a range: {', '.join(with_range())}"
            )

    @classmethod
    def takes_negative_prompt(cls) -> bool:
        try:
            cls.check_negative_prompt()
        except ValueError:
            return False
        return True

    @classmethod
    def check_negative_prompt(cls) -> None:
        """Raises ValueError where the stock pipeline's guidance leads away from no prompt of the user's."""
        if cls.embedded_guidance is not None:
            raise ValueError(f"the guidance of a {cls.pipeline.__name__} is part of its network and leads away from no prompt")
        if "negative_prompt" not in inspect.signature(cls.pipeline.__call__).parameters:
            raise ValueError(f"a stock {cls.pipeline.__name__} takes none: its guidance leads away from the empty prompt")

    def check_guidance(self, guidance: float | tuple[float, float]) -> None:
        """Raises ValueError for guidance of a teacher whose stock pipeline ignores it, for a range where students cannot have one, and for
        a teacher that is itself told its scale by an added input."""
        if self.keeps_guidance():
            raise ValueError(KEPT_GUIDANCE.format(self.source))
        if isinstance(guidance, tuple):
            self.check_range()
        if guidance != 1 and not self.takes_guidance():
            told = f"{guidance:g}" if not isinstance(guidance, tuple) else f"[{guidance[0]:g}, {guidance[1]:g}]"
            raise ValueError(f"{self.source} is distilled to few steps and takes no guidance, got {told}: set matching.guidance to 1")

    def roles(
        self,
        *,
        lora_rank: int = 0,
        fake_steps: int = 0,
        guidance: float | tuple[float, float] = 1.0,
        negative_prompt: str = "",
        checkpointing: bool = False,
        int8_teacher: bool = False,
        compiled: bool = False,
    ) -> Roles:
        """Teacher, student and fake, the last two starting as the teacher.

        lora_rank 0: full copies, in float32. Otherwise one base with two adapters; the teacher is the base with both off.
        fake_steps: how many student steps the fake is conditioned on (0: none).
        guidance: what a guidance-distilled teacher is told; student and fake are told what the stock pipeline is called with. Of a range
        all that can be told are told each sample's own scale; an input that this needs is added to student and fake, its weights zero.
        negative_prompt: what the teacher's guidance leads away from; "": the empty prompt.
        checkpointing, int8_teacher, compiled: as the config's `memory` and `compile` say; some decoders cannot compute theirs again.
        Raises ValueError for guidance, and for a negative prompt, of a teacher whose stock pipeline ignores it.
        """
        self.check_guidance(guidance)
        if negative_prompt:
            self.check_negative_prompt()
        added = isinstance(guidance, tuple) and self.scale_input == "added"
        models, adapters = self.adapted_base(lora_rank, added) if lora_rank else self.full_copies(added, int8_teacher)
        if checkpointing:
            for model in set(models):
                model.enable_gradient_checkpointing(recompute(adapters))
            if self.pipe.vae._supports_gradient_checkpointing:  # AutoencoderDC and AutoencoderKLQwenImage do not
                self.pipe.vae.enable_gradient_checkpointing(recompute(None))
        if compiled:
            # traced for each kind of block and each role, with a gradient and without: beyond its limit torch would stop compiling
            put_back(setattr, torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, TRACES)
            for block in itertools.chain.from_iterable(map(repeated_blocks, set(models))):
                block.compile()
        told, scale = self.told_scales(guidance)
        networks = (
            Network(self, models[0], adapters=adapters, adapter="", guidance=told[0]),
            Network(self, models[1], adapters=adapters, adapter="student", guidance=told[1]),
            Network(self, models[2], adapters=adapters, adapter="fake", steps=fake_steps, guidance=told[2]),
        )
        networks = [network.to(self.device) for network in networks]

        def owned(network: Network, role: str) -> dict[str, nn.Parameter]:
            part = f".{role}." if lora_rank else "model."
            return {name: p for name, p in network.named_parameters() if name.startswith("step_embedding") or part in name}

        teacher = self.denoiser(networks[0], scale, negative_prompt=negative_prompt)
        trained = (self.denoiser(network, scale) for network in networks[1:])
        return Roles(teacher, *trained, owned(networks[1], "student"), owned(networks[2], "fake"))

    def told_scales(self, guidance: float | tuple[float, float]) -> tuple[tuple[float | Literal["each"] | None, ...], float | None]:
        """(the scales that teacher, student and fake are told in every call, as Network's `guidance`; what an embedded guidance is told
        where nothing but the empty prompt is asked about)."""
        if not isinstance(guidance, tuple):
            own = self.embedded_guidance
            return (None, None, None) if own is None else (guidance, own, own), None
        if self.scale_input == "added":
            return (None, "each", "each"), None
        return ("each", "each", "each"), sum(guidance) / 2

    def full_copies(self, scale_input: bool, int8_teacher: bool) -> tuple[tuple[nn.Module, ...], None]:
        """(teacher, student and fake, the last two trainable copies in float32; no adapters). scale_input: with an input for a scale."""
        base = self.model
        student, fake = (copy.deepcopy(base).float() for _ in range(2))
        for model in (student, fake):
            if scale_input:
                self.add_scale_input(model)
            model.requires_grad_(True)
        if int8_teacher:
            in_eight_bits(base)
        return (base, student, fake), None

    def adapted_base(self, rank: int, scale_input: bool) -> tuple[tuple[nn.Module, ...], Adapters]:
        """(one base for all three roles, its two LoRA adapters in float32). scale_input: with an input for a scale."""
        base, config = self.model, self.lora_config(rank)
        if scale_input:  # its base is zero: the adapter is all of it
            config.target_modules |= {self.add_scale_input(base)}
        config._register_custom_module({nn.Linear: AddedLinear})
        for name in ("student", "fake"):
            inject_adapter_in_model(config, base, adapter_name=name)
        for name, parameter in base.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        return (base, base, base), Adapters(base)

    def lora_config(self, rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=self.lora_targets)

    # -- export ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def student_pipeline(self, roles: Roles, weights: dict[str, Tensor], steps: int) -> Any:
        """A stock pipeline that holds a merged copy of the student with the given weights, on the CPU, and the K-step scheduler."""
        network: Any = roles.student.network
        # deepcopy takes what it finds under an object's id for its copy
        known: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), False) for p in network.model.parameters()}
        known |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in network.model.buffers()}
        model = copy.deepcopy(network.model, known).requires_grad_(False)
        own = dict(model.named_parameters())
        for name, value in weights.items():
            own[name.removeprefix("model.")].copy_(value)
        if network.adapters:
            model = merged(model, network.adapter)
        if network.guidance == "each":
            self.name_scale_input(model, True)
        pipe = copy.copy(self.pipe)  # the teacher's other parts and settings
        pipe.register_modules(**{self.part: model.to(self.dtype).eval(), "scheduler": self.scheduler(steps)})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @contextmanager
    def drawing(self, role: Denoiser, scheduler: Any, weights: dict[str, Tensor] | None = None) -> Iterator[Any]:
        """A stock pipeline on a role's own network, for as long as this lasts: nothing is copied, `weights` lie in place of its own."""
        network: Any = role.network
        own, weights = dict(network.named_parameters()), weights or {}
        before = {name: own[name].data for name in weights}
        pipe = copy.copy(self.pipe)
        pipe.register_modules(**{self.part: network.model, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        # pictures are decoded one at a time, where the decoder can: sixteen of 1024 x 1024 would take 26 GB in bf16 beside the training
        slices = getattr(pipe.vae, "use_slicing", None)
        try:
            if slices is not None:
                pipe.vae.use_slicing = True
            for name, value in weights.items():
                own[name].data = value.to(own[name])
            network.switch()
            if network.guidance == "each":
                self.name_scale_input(network.model, True)
            mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)  # full weights are float32
            with self.on_device([*self.text_modules(), pipe.vae]), mixed, torch.no_grad():
                yield pipe
        finally:
            if slices is not None:
                pipe.vae.use_slicing = slices
            for name, value in before.items():
                own[name].data = value
            if network.guidance == "each":
                self.name_scale_input(network.model, False)

    @classmethod
    def hands_on_generator(cls) -> bool:
        """Whether the stock pipeline's `generator=` is also its scheduler's, which draws noise between a student's steps; of most flow
        models' it is not."""
        return hasattr(cls.pipeline, "prepare_extra_step_kwargs")

    @classmethod
    def saves_lora(cls) -> bool:
        """Whether the stock pipeline reads LoRA files."""
        return hasattr(cls.pipeline, "save_lora_weights")

    @classmethod
    def draws_from_pictures(cls) -> bool:
        """Whether diffusers has an image-to-image pipeline of the same family."""
        return hasattr(diffusers, cls.pipeline.__name__.removesuffix("Pipeline") + "Img2ImgPipeline")

    def kohya_version(self) -> str | None:
        """What kohya's trainer calls the base model; None for one that it does not know."""
        return None

    def lora_layers(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The student's LoRA weights by the names of a saved adapter, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""
        return {name.removeprefix("model.").replace(".student.", "."): value for name, value in weights.items()}

    def save_lora(self, weights: dict[str, Tensor], folder: Path, *, rank: int) -> None:
        """pytorch_lora_weights.safetensors with adapter metadata, for `load_lora_weights` on the teacher's pipeline.

        Raises ValueError where the stock pipeline has no LoRA loader: use the full folder.
        """
        if not self.saves_lora():
            raise ValueError(f"{self.pipeline.__name__} has no LoRA loader in diffusers: export the full folder")
        adapter = self.lora_config(rank).to_dict()
        self.pipeline.save_lora_weights(
            folder, **{f"{self.part}_lora_layers": self.lora_layers(weights), f"{self.part}_lora_adapter_metadata": adapter}
        )
        give_usual_mode(folder / "pytorch_lora_weights.safetensors")

    def own_files(self, name: str, part: Any) -> Path | None:
        """The folder with the teacher's own files of a part that a student has from it as they are, where they are still there.

        Tokenizers and processors: transformers writes them in another form and under other names, which its earlier versions do not read.
        A text encoder that is stored in 4 or 8 bits: transformers cannot write what it has read so.
        """
        if part is None or isinstance(part, SchedulerMixin) or (isinstance(part, nn.Module) and not stored_packed(part)):
            return None
        network = self.model.config.get("_name_or_path")
        folder = Path(network).parent / name if network else None
        return folder if folder is not None and folder.is_dir() else None

    def save(self, pipe: Any, folder: Path) -> None:
        """A folder that stock diffusers opens. Its configurations do not say where on this machine the teacher lay."""
        kept = {name: own for name, part in pipe.components.items() if (own := self.own_files(name, part)) is not None}
        entries, whole = {name: index_of(str(own.parent))[name] for name, own in kept.items()}, copy.copy(pipe)
        whole.register_modules(**dict.fromkeys(kept))
        for name in pipe.components:  # of an earlier save in more files: diffusers leaves it, and then looks for those
            for index in (folder / name).glob("*.safetensors.index.json"):
                index.unlink()
        for name, own in kept.items():
            if not is_one(own, folder / name):
                shutil.rmtree(folder / name, ignore_errors=True)  # Windows keeps what a program holds: the files are then written over
                shutil.copytree(
                    own, folder / name, dirs_exist_ok=True,
                    ignore=lambda _, files: [file for file in files if Path(file).suffix not in KEPT],
                    copy_function=shutil.copyfile,  # without the mode: Windows removes no read-only file
                )  # fmt: skip
        whole.save_config = lambda *_: None  # model_index.json comes last: diffusers' has null for what was copied
        whole.save_pretrained(folder, safe_serialization=True)
        for name in pipe.components.keys() - kept.keys():
            for path in (folder / name).glob("*.safetensors"):
                give_usual_mode(path)
        texts = {path: path.read_text(encoding="utf-8") for part in pipe.components if (path := folder / part / "config.json").is_file()}
        for path, text in (texts | {folder / "model_index.json": whole.to_json_string()}).items():
            config = json.loads(text, object_hook=without_path) | (entries if path.parent == folder else {})
            replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
