"""What a run will need: memory by what holds it, floating-point operations, disk. From configurations alone: no weight is read."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fewstep.config import FREE_ON_RESUME, LAG_EVERY, Config
from fewstep.cost import flops_both_ways
from fewstep.evaluate.drawing import GRID_BATCH
from fewstep.folder import SAME_FOR_INIT
from fewstep.launch import launched, neighbours
from fewstep.models import CONFIGURATIONS, UnsupportedTeacher, family, frozen_dtype, index_of, one_line, snapshot
from fewstep.models.backbone import Backbone, Roles, packed_network

GIB = 2**30
SMALL_GROUP = 2  # samples of a prompt, the fewest whose scale eq. (5) takes
LOW_RANK = 16  # of LoRA, to which the recipes' may be lowered
UNUSED = ("FeatureExtractor", "ImageProcessor", "SafetyChecker")  # ends of the classes that no run computes with; some are gone by now


class Needs(NamedTuple):
    """Bytes, and numbers of parameters."""

    networks: int  # teacher, student and fake, with what they train
    decoder: int
    text: int  # the text encoders
    optimizer: int  # moments, and the student's running average
    gradients: int
    activations: int  # of the part of a batch that passes together, with what its backward pass needs
    pictures: int  # what decoding those of a part keeps, where a reward looks at them
    one_picture: int  # what decoding one takes
    drawn: int  # what the network's own pass takes, of the pictures of a grid that are drawn together
    conditions: int  # of a batch's prompts
    cached: int  # of all prompts that are drawn, on disk
    student_folder: int  # on disk
    trained: int  # parameters of the student
    parameters: int  # of the teacher's network
    encoding: int  # on the device, at the start: the teacher's network is there and the text encoders read the prompts
    training: int  # on the device
    drawing: int  # on the device, between two updates and at the end: no gradients, but all that the stock pipeline is made of
    writing: int  # in main memory: a copy of all that a checkpoint holds, while one is written
    exporting: int  # in main memory: a copy of the student's network and of its average, while it is exported
    saving: int  # on the device, where that is main memory itself: the larger of these two beside what is there; elsewhere 0
    reading: int  # in main memory of each process, where that is not the device: the whole teacher, before its network goes to the device
    resting: int  # in main memory of each process, where that is not the device: what lies there all through the training
    packed: list[str]  # parts that lie in 4 or 8 bits in their files; in `text`, and above, as if they did not

    @property
    def checkpoints(self) -> int:
        """Bytes on disk, of the two that are kept."""
        return 2 * self.writing

    @property
    def phases(self) -> tuple[int, int, int, int]:
        return self.encoding, self.training, self.drawing, self.saving

    @property
    def device(self) -> int:
        """The largest of the four."""
        return max(self.phases)

    def beyond(self, room: float) -> float:
        """Bytes that the phases together lack where there are `room`."""
        return sum(max(0.0, phase - room) for phase in self.phases)


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def configurations(source: str) -> str:
    """Folder with a teacher's configurations: the folder itself, or what the hub has beside the weights."""
    return source if Path(source).is_dir() else snapshot(source, CONFIGURATIONS)


def skeleton(source: str, dtype: torch.dtype) -> Backbone:
    """A family's adapter whose modules have shapes and no numbers (the meta device). source: a folder with its configurations."""
    import importlib

    import transformers

    adapter = family(source)
    folder = Path(configurations(source))
    index = index_of(str(folder))
    adapter.absent(index, source)
    parts: dict[str, Any] = dict.fromkeys(adapter.pipeline._optional_components)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or name in adapter.load_options:
            continue
        library, kind = entry
        if library is None or kind.endswith(UNUSED):
            parts[name] = None
            continue
        # the file decides no import: beside the libraries themselves a pipeline's module in diffusers is known, as diffusers knows it
        known = library in ("diffusers", "transformers")
        home = importlib.import_module(library) if known else getattr(importlib.import_module("diffusers.pipelines"), library, None)
        if home is None:
            raise UnsupportedTeacher(f"{source}: {name} is a {kind} of {library!r}; parts of diffusers and transformers are known")
        try:
            cls = getattr(home, kind)
            if issubclass(cls, transformers.PreTrainedModel):
                with torch.device("meta"):
                    parts[name] = cls(cls.config_class.from_pretrained(folder / name)).to(dtype)
            elif issubclass(cls, nn.Module):
                held = cls.load_config(folder / name)
                if name == adapter.part and "quantization_config" in held:
                    raise packed_network(source, name, held["quantization_config"]["quant_method"])
                with torch.device("meta"):
                    parts[name] = cls.from_config(held).to(dtype)
            else:
                parts[name] = cls.from_pretrained(folder / name)
        except (OSError, AttributeError) as error:
            raise UnsupportedTeacher(f"{source}: {name} cannot be read ({type(error).__name__}: {one_line(error)})") from error
    settings = {key: value for key, value in index.items() if isinstance(value, bool)}
    pipe = adapter.pipeline(**parts | settings | adapter.load_options)
    backbone = adapter(pipe, source, device="meta")
    backbone.encode = lambda prompts, guidance=None: backbone.random_conditions(len(prompts), guidance)
    return backbone


class Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps, its inputs and its output; on tensors without numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = query.shape[-3] // key.shape[-3]  # several heads of the query share one of the keys
        keys, values = (x.repeat_interleave(heads, -3) if heads > 1 else x for x in (key, value))
        output = query @ keys.transpose(-1, -2) @ values
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("nothing is computed here")


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """scaled_dot_product_attention as a fused kernel keeps memory: the meta device's own keeps every score."""
    from unittest import mock

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():  # nothing is kept, and no score ever lies in memory
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return Attention.apply(query, key, value)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend):
        yield


class Kept:
    """Bytes that autograd keeps of what is computed within, parameters apart; with checkpointing, what it keeps between blocks and the
    most that one block keeps while it is computed again."""

    def __init__(self, own: Iterable[Tensor]):
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.outside: dict[int, int] = {}
        self.block: dict[int, int] | None = None
        self.largest_block = 0

    def keep(self, tensor: Tensor) -> Any:
        """Its storage, in its place: in autograd's hands an output would hold its own graph, for as long as the process lives."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            (self.outside if self.block is None else self.block)[storage._cdata] = storage.nbytes()
        return storage

    def checkpoint(self, block: Any, *args: Any) -> Any:
        """In place of torch's: the block's inputs are kept, the rest is made again."""
        for value in args:
            if isinstance(value, Tensor):
                self.keep(value)
        if self.block is not None:  # inside another
            return block(*args)
        self.block = {}
        output = block(*args)
        self.largest_block = max(self.largest_block, sum(self.block.values()))
        self.block = None
        return output

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda storage: storage)

    @property
    def bytes(self) -> int:
        return sum(self.outside.values()) + self.largest_block


class Peak(TorchDispatchMode):
    """The most bytes of tensors made within that live at once; own: those that are there already."""

    def __init__(self, own: Iterable[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.live = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.leave, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self.live)
        return output

    def leave(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.live -= size


def passes(config: Config, guided: bool) -> dict[str, tuple[float, float]]:
    """Role -> (forward, backward) passes that an update costs for each of its samples.

    What importance weights will allow is not known before a run, and for a large teacher it is nothing: so R_dm's evaluations are
    counted as if none served twice, where weights decide. Other rewards' directions serve as often as they are asked to.
    """
    reuse, updates, adaptive = config.reuse, config.fake.updates, config.weights.mode == "adaptive"
    served = 1 if reuse.weighted and reuse.min_ess > 0 else reuse.evaluation
    asked = config.matching.draws / served  # how often R_dm asks teacher and fake
    policies = any(config.via.get(name) == "policy" for name in config.reward)
    beside = config.weights.mode != "advantage" and any(config.via.get(name) != "policy" for name in config.reward)
    trained = 1 + policies * (config.steps - 1)  # predictions of the student that have a gradient
    if reuse.backward_simulation:  # a simulation stops at each of the K states equally often
        rolled, lag = (config.steps + 1) / 2 * config.batches() / config.updates, 0.0
    else:
        rollouts = 1 / (reuse.rollout * (reuse.evaluation if beside else served))
        refused = float(served < reuse.evaluation and not beside)  # a prediction that found the weights gone and serves nothing
        # the lag: on a rollout's outputs and on those of the one before
        rolled, lag = config.steps * rollouts + refused, 2 * rollouts / (1 if adaptive else LAG_EVERY)
    return {
        "student": (rolled + trained, trained),
        "teacher": ((1 + guided) * asked + lag * adaptive, 0),
        "fake": (asked + lag + updates, updates),
    }


def drawn_prompts(config: Config, prompts: int) -> int:
    """How many of so many prompts a run draws, and encodes."""
    return min(prompts, config.batches() * config.groups)


def scales(config: Config, n: int) -> Tensor | None:
    """Guidance scales (n,) that conditions tell, where there is a range of them."""
    return None if config.matching.guidance_range is None else torch.ones(n)


def measure(source: str, config: Config, prompts: int) -> Needs:
    """What a run of this config on this teacher needs. config: with its hardware resolved; prompts: how many there are.

    Activations are those that the student's backward pass needs, in the arithmetic of the training, and those of the autoencoder, in its
    own; work space of kernels and the allocator's reserve come on top, some tenths. The rewards' own models are not in it.
    """
    frozen = frozen_dtype(config)
    backbone = skeleton(source, frozen)
    batch = config.groups * config.group_size
    together = groups_together(config) * config.group_size
    text, decoder = (size(p for m in modules for p in m.parameters()) for modules in (backbone.text_modules(), [backbone.pipe.vae]))
    parameters, base = sum(p.numel() for p in backbone.model.parameters()), size(backbone.model.parameters())
    roles = roles_of(backbone, config)
    held = {id(p): p for role in roles[:3] for p in role.parameters()}
    trained = {"student": [*roles.student_parameters.values()], "fake": [*roles.fake_parameters.values()]}
    gradients = size(p for parameters in trained.values() for p in parameters)
    moments = gradients // 2 if config.memory.optimizer == "adamw8bit" else 2 * gradients
    averaged = size(trained["student"])
    networks = size(held.values())
    if config.memory.teacher == "int8":
        networks -= round(size(roles.teacher.parameters()) * (1 - 1 / frozen.itemsize))
    condition = size(backbone.random_conditions(1, scales(config, 1)).values())
    in_one = torch.device(config.device).type == "cpu"  # main memory and the device's
    resting = text + decoder if in_one else 0  # what would lie on the CPU is on the device then too
    looks = any(name != "discriminator" for name in config.reward)  # at pictures, in every update: the decoder stays
    shapes = [backbone.latent_shape(at) for at in config.sizes()]
    exported = sum(p.numel() for name, p in roles.student.network.model.named_parameters() if ".lora_" not in name)
    activated = max(activations(backbone, roles, config, shape, together) for shape in shapes)
    pathwise = config.weights.mode != "advantage" and any(
        name != "discriminator" and config.via.get(name, "pathwise") == "pathwise" for name in config.reward
    )
    pictures = max(decoding(backbone, config, shape, together, grad=pathwise) for shape in shapes) if looks else 0
    one_picture = max(decoding(backbone, config, shape, 1, grad=False) for shape in shapes)
    drawn = max(drawing(backbone, roles, config, shape) for shape in shapes)
    copied = averaged // 2 if frozen == torch.bfloat16 else 0  # of trained weights in float32 autocast keeps copies throughout a grid
    held_throughout = networks + moments + averaged + condition * batch
    writing = gradients + moments + averaged  # what is trained is as large as its gradients
    exporting = size(roles.student.network.model.parameters()) + averaged
    return Needs(
        networks=networks,
        decoder=decoder,
        text=text,
        optimizer=moments + averaged,
        gradients=gradients,
        activations=activated,
        pictures=pictures,
        one_picture=one_picture,
        drawn=drawn,
        conditions=condition * batch,
        cached=size(backbone.random_conditions(1).values()) * drawn_prompts(config, prompts),
        student_folder=exported * frozen.itemsize + decoder + text,
        trained=sum(p.numel() for p in trained["student"]),
        parameters=parameters,
        encoding=base + (resting or text),
        training=held_throughout + working(config, gradients, activated, pictures) + (resting or decoder * looks),
        # the average is copied out and lies in place of the student's own
        drawing=held_throughout + averaged + copied + text + decoder + max(drawn, one_picture),
        writing=writing,
        exporting=exporting,
        saving=held_throughout + resting + max(writing, exporting) if resting else 0,
        reading=0 if in_one else base + text + decoder,
        resting=0 if in_one else text + decoder * (not looks),
        packed=[name for name, part in backbone.pipe.components.items() if hasattr(getattr(part, "config", None), "quantization_config")],
    )


def operations(source: str, config: Config) -> float:
    """Floating-point operations of one update, rewards and decoder apart; of several sizes the mean."""
    backbone = skeleton(source, frozen_dtype(config))
    roles = roles_of(backbone, config)
    counted = passes(config, guided=config.matching.guidance != 1 and backbone.embedded_guidance is None)
    dtype = arithmetic(config)
    shapes = [backbone.latent_shape(at) for at in config.sizes()]
    spent = 0.0
    for shape in shapes:
        with contextlib.ExitStack() as stack:
            for network in {id(role.network.model): role.network for role in roles[:2]}.values():  # one, where they are adapters
                stack.enter_context(in_arithmetic(network, dtype))
            given = inputs(backbone, config, shape, 1, dtype)
            teacher, student = (flops_both_ways(role.network, given, trained=role is roles.student) for role in roles[:2])
        of_a_pass = {"teacher": teacher, "student": student, "fake": student}  # whatever step a fake is told costs next to nothing
        spent += sum(n * each for role in counted for n, each in zip(counted[role], of_a_pass[role], strict=True))
    return spent / len(shapes) * config.groups * config.group_size


def roles_of(backbone: Backbone, config: Config) -> Roles:
    return backbone.roles(lora_rank=config.lora_rank, fake_steps=config.steps, guidance=config.matching.guidance)


def arithmetic(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def activations(backbone: Backbone, roles: Roles, config: Config, shape: tuple[int, int, int], n: int) -> int:
    """Bytes kept for the student's backward pass of n samples."""
    network = roles.student.network
    half = config.precision == "bf16"
    # of a layer's weight in float32 autocast makes a copy, which is kept too
    layers = (module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    copied = {id(module.weight) for module in layers} if half else set()
    own = [p for p in network.parameters() if p.dtype == torch.bfloat16 or id(p) not in copied]
    dtype = arithmetic(config)
    with in_arithmetic(network, dtype):
        kept = Kept([*own, *network.buffers()])
        if config.memory.checkpointing:
            network.model.enable_gradient_checkpointing(kept.checkpoint)
        with fused_attention(), kept.hooks():
            network(*inputs(backbone, config, shape, n, dtype))
    network.model.disable_gradient_checkpointing()
    return kept.bytes


def drawing(backbone: Backbone, roles: Roles, config: Config, shape: tuple[int, int, int]) -> int:
    """Bytes of a pass of the network, the most that lives at once, as a grid's pictures take it that are drawn together; with guidance of
    the teacher's, which most pipelines take in the same pass, for each of them twice."""
    guided = config.shown_guidance() != 1 and backbone.embedded_guidance is None
    network, dtype = roles.student.network, frozen_dtype(config)
    given = inputs(backbone, config, shape, GRID_BATCH * (1 + guided), dtype)
    with in_arithmetic(network, dtype):
        own = [*network.parameters(), *network.buffers(), *given[:2], *given[2].values()]
        with fused_attention(), torch.no_grad(), Peak(own) as peak:
            network(*given)
    return peak.bytes


def inputs(backbone: Backbone, config: Config, shape: tuple[int, int, int], n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """What the network is called with for n samples, without numbers."""
    given = backbone.random_conditions(n, scales(config, n))
    cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    xt, t = (torch.zeros(n, *shape, device="meta", dtype=dtype), torch.full((n,), 500.0, device="meta", dtype=dtype))
    return xt, t, cond


@contextlib.contextmanager
def in_arithmetic(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the network's weights are of the arithmetic: autocast is not to be had without numbers, and this stands for it."""
    before = {name: p.data for name, p in network.named_parameters()}
    if dtype != torch.float32:
        network.to(dtype)
    yield
    for name, parameter in network.named_parameters():
        parameter.data = before[name]


def decoding(backbone: Backbone, config: Config, shape: tuple[int, int, int], n: int, *, grad: bool) -> int:
    """Bytes that decoding n samples' latents takes: the most that lives at once, or, if more, what is kept for a gradient in them."""
    vae = backbone.pipe.vae
    own = [*vae.parameters(), *vae.buffers()]
    x0 = torch.zeros(n, *shape, device="meta")
    with fused_attention(), torch.no_grad(), Peak([*own, x0]) as peak:
        backbone.decode(x0)
    if not grad:
        return peak.bytes
    kept = Kept(own)
    recomputed = config.memory.checkpointing and vae._supports_gradient_checkpointing
    if recomputed:
        vae.enable_gradient_checkpointing(kept.checkpoint)
    with fused_attention(), kept.hooks():
        backbone.decode(x0.requires_grad_())
    if recomputed:
        vae.disable_gradient_checkpointing()
    return max(peak.bytes, kept.bytes)


def working(config: Config, gradients: int, activated: int, pictures: int) -> int:
    """Bytes of an update beside what is held throughout: gradients with the activations of a part, or the pictures of one, before there is
    a gradient; a batch in one part is decoded beside the graph of its prediction."""
    beside = activated if groups_together(config) == share(config) else 0
    return max(gradients + activated, beside + pictures)


def share(config: Config) -> int:
    """Groups of a batch that each of the launched processes has."""
    return config.groups // launched()[1]


def groups_together(config: Config) -> int:
    return min(config.memory.micro_groups or share(config), share(config))


def halved(source: str, config: Config) -> list[str]:
    """The run's sizes with half of each edge, in the steps that the family draws in; none where an edge has no half."""
    backbone = skeleton(source, torch.float32)
    step = backbone.size_step()
    sizes = [tuple(edge // 2 // step * step for edge in size or backbone.default_size()) for size in config.sizes()]
    return [f"{height}x{width}" for height, width in sizes] if all(min(size) for size in sizes) else []


def savings(source: str, config: Config) -> list[dict[str, Any]]:
    """What can be turned for a run to need less memory, each as dotted names and values, in the order in which it costs least."""
    found: list[dict[str, Any]] = [{"memory.micro_groups": 1}]
    if config.precision == "bf16":  # frozen bf16 needs bf16 arithmetic
        found.append({"memory.frozen": "bf16"})
    found += [{"memory.optimizer": "adamw8bit"}, {"memory.checkpointing": True}]
    if config.group_size > SMALL_GROUP:
        found.append({"group_size": SMALL_GROUP})
    if not config.lora_rank:  # int8 needs full weights
        found += [{"memory.teacher": "int8"}, {"lora_rank": 64, "memory.teacher": "exact"}]
    elif config.lora_rank > LOW_RANK:
        found.append({"lora_rank": LOW_RANK})
    sizes = halved(source, config)
    found += [{"size": sizes}] * bool(sizes)
    return [change for change in found if turned(config, change) != config and may_change(config, change)]


def may_change(config: Config, change: dict[str, Any]) -> bool:
    """Whether a run that goes on, or begins with another one's networks, takes a change."""
    if config.resume:
        return change.keys() <= set(FREE_ON_RESUME)
    return config.init is None or not change.keys() & set(SAME_FOR_INIT)


def turned(config: Config, change: dict[str, Any]) -> Config:
    """The config with what one of `savings`, or several together, sets."""
    memory = {name.removeprefix("memory."): value for name, value in change.items() if name.startswith("memory.")}
    own = {name: value for name, value in change.items() if not name.startswith("memory.")}
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, **memory), **own)


def as_flags(config: Config, change: dict[str, Any]) -> str:
    """The flags that say what a change sets otherwise than the config has it."""
    told = {name: ",".join(value) if name == "size" else value for name, value in change.items()}
    others = [name for name, value in change.items() if operator.attrgetter(name)(config) != value]
    return " ".join(f"--{name.replace('_', '-')}" + f" {told[name]}" * (told[name] is not True) for name in others)


def advice(source: str, config: Config, prompts: int, needs: Needs, room: float) -> list[str]:
    """What a run that needs more than `room` bytes of the device's memory can do, a line each: what can be turned, alone and, where nothing
    alone is enough, as many together as it takes."""

    def with_(change: dict[str, Any]) -> Needs:
        return measure(source, turned(config, change), prompts)

    def line(change: dict[str, Any], found: Needs) -> str:
        note = " (a teacher draws worse far below its own size)" * ("size" in change)
        return f"  {found.device / GIB:8.2f} GiB with {as_flags(config, change)}{note}" + ", which fits" * (found.device <= room)

    alone = [(change, with_(change)) for change in savings(source, config)]
    lines = [line(change, found) for change, found in alone if found.device < needs.device]
    if any(found.device <= room for _, found in alone):
        return lines
    together, least = {}, needs
    for change, found in alone:
        # of all phases: what a change saves in one may show once others have made another smaller
        if found.beyond(room) < needs.beyond(room) and least.device > room:
            together, least = together | change, with_(together | change) if together else found
    if len(together) > 1:
        lines.append(line(together, least))
    if least.device > room:
        lines.append(
            f"  no setting known here makes it fit: {least.networks / GIB:.2f} GiB are teacher, student and fake, {least.text / GIB:.2f} "
            "GiB the text encoders; give a smaller teacher, or a device with more memory"
        )
    return lines


def capacity(device: str) -> tuple[int, str]:
    """(bytes, name) of the memory that a run on this device has."""
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, properties.name
    import psutil

    return psutil.virtual_memory().total, "this machine's memory"


def largest_part(config: Config, needs: Needs, room: float) -> int:
    """The most prompts that may pass together (memory.micro_groups) in `room` bytes: activations and pictures alone grow with them."""
    together = groups_together(config)
    spare = room - (needs.training - working(config, needs.gradients, needs.activations, needs.pictures))
    times = min((spare - needs.gradients) / needs.activations, spare / (needs.activations + needs.pictures))
    return min(max(together, int(times * together)), share(config))


def report(source: str, config: Config, prompts: int) -> str:
    """What `fewstep distill --dry-run` prints."""
    needs = measure(source, config, prompts)
    total, name = capacity(config.device)

    def gib(value: int) -> str:
        return f"{value / GIB:8.2f} GiB"

    processes, drawn = launched()[1], drawn_prompts(config, prompts)
    each = f"each of {processes} processes, " if processes > 1 else ""
    student = "full weights" if not config.lora_rank else f"LoRA of rank {config.lora_rank}"
    beside = f"  and for each of the {neighbours()} processes here, " if neighbours() > 1 else "  and "
    waiting = f"{beside}with what waits there to be needed on the device: " if needs.resting else ""
    lines = [
        f"{config.teacher}: {needs.parameters / 1e6:,.1f} M parameters; {student}, {needs.trained / 1e6:,.1f} M trained for the student",
        f"{each}on {config.device} in {config.precision}, frozen parts in {config.memory.frozen}:",
        f"  {gib(needs.networks)}  teacher, student and fake",
        f"  {gib(needs.optimizer)}  optimizers' moments and the student's average",
        f"  {gib(needs.gradients)}  gradients",
        f"  {gib(needs.activations)}  activations (estimate: kernels' work space and the allocator's reserve come on top)",
        f"  {gib(needs.decoder)}  autoencoder",
        f"  {gib(needs.pictures or needs.one_picture)}  its activations, "
        + ("of the pictures of a part for the rewards" if needs.pictures else "of one picture while samples are drawn"),
        f"  {gib(needs.drawn)}  the network's activations while samples are drawn, {GRID_BATCH} at a time",
        f"  {gib(needs.text)}  text encoders",
        f"  {gib(needs.conditions)}  conditions of a batch",
        "the most that is there at once:",
        f"  {gib(needs.encoding)}  while prompts are encoded",
        f"  {gib(needs.training)}  in training",
        f"  {gib(needs.drawing)}  while samples are drawn",
        *([f"  {gib(needs.saving)}  while it is saved or exported"] if needs.saving else []),
        f"in main memory{' for that' * bool(needs.saving)}: copies of {gib(needs.writing).strip()} while a checkpoint is written, of "
        f"{gib(needs.exporting).strip()} while the student is exported",
        *(
            [f"{waiting}{gib(needs.reading).strip()} while the teacher is read, {gib(needs.resting).strip()} from then on"]
            if waiting
            else []
        ),
        f"{operations(source, config) * config.updates / 1e15:,.2f} PFLOP in {config.updates} updates, rewards and decoder apart",
        f"on disk: {gib(needs.student_folder).strip()} student, {gib(needs.checkpoints).strip()} checkpoints, "
        f"{gib(needs.cached).strip()} conditions of {drawn} prompt{'s' * (drawn > 1)}",
    ]
    if config.reward:
        lines.append(f"not counted: the models of {', '.join(config.reward)}, and what they keep of the pictures")
    if needs.packed:
        lines.append(f"less than said: {', '.join(needs.packed)} counts as in its full bits and lies in fewer in its files")
        if not needs.saving:
            lines.append("more than said in training: on a GPU it stays there, where other text encoders do not")
    fits, larger = needs.device <= 0.9 * total, largest_part(config, needs, 0.9 * total)
    lines.append(f"{'fits' if fits else 'DOES NOT FIT'}: {name} has {gib(total).strip()}")
    if fits and torch.device(config.device).type == "cuda" and 0 < config.memory.micro_groups < larger:
        # to launch a pass takes the processor the same time whatever passes: docs/performance.md
        lines.append(f"  room for --memory.micro-groups {larger}: fewer and larger passes, for which a GPU waits less")
    if not fits:
        lines += advice(source, config, prompts, needs, 0.9 * total)
    return "\n".join(lines)
