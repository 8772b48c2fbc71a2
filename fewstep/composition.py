"""The composition root: what a config names is found and checked before anything slow, then `build` makes every object of a run."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from fewstep.device import resolve_device, take
from fewstep.errors import UserError, nearest, sentence
from fewstep.launch import neighbours, place

if TYPE_CHECKING:
    from fewstep.config import Config
    from fewstep.latents import Real
    from fewstep.ranks import Ranks


HELD_OUT = "held-out"  # a judge's source: the embedded world's own twin of the reward with its name
FAINT = 0.02  # share of the picture in the first noise level, below which rounding a predicted noise to bf16 is seen in x0
ROUNDING = 0.0017  # root mean square of what rounding to bf16 takes from or adds to standard normal numbers


def resolve_teacher(name: str) -> str:
    """Folder of a teacher, or hub id with its commit; `world` is the embedded one. Raises UserError, before torch is imported."""
    from fewstep import models, world

    source = world.source(name)
    try:
        models.pipeline_class(source)
        return models.pinned(source)
    except models.UnsupportedTeacher as error:
        raise UserError(f"teacher: {error}") from error


def check_guidance(config: Config, source: str) -> None:
    """Raises UserError, before any weight is read, for a range of guidance where students cannot have one, for a negative prompt where the
    teacher's pipeline takes none, and for a teacher that is itself a student with a range."""
    from fewstep import models

    if models.folder_keeps_guidance(Path(source)):
        raise UserError(f"teacher: {models.KEPT_GUIDANCE.format(source)}")
    if config.matching.guidance_range is not None:
        models.quiet_libraries()
        try:
            models.family(source).check_range()
        except ValueError as error:
            raise UserError(f"matching.guidance: {error}") from error
    if config.matching.negative_prompt:
        models.quiet_libraries()
        try:
            models.family(source).check_negative_prompt()
        except ValueError as error:
            raise UserError(f"matching.negative_prompt: {error}; leave it out") from error


def resolve_hardware(config: Config) -> Config:
    """The config with `auto` replaced by what this machine has. Raises UserError for a device that it has not."""
    import torch

    try:
        device, precision = resolve_device("device", config.device), config.precision
    except ValueError as error:
        raise UserError(str(error)) from error
    if precision == "auto":
        if torch.device(device).type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # older torch cannot say
            abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            # Intel's AVX-512 multiplies in bf16 at half its rate in fp32 (an update takes 1.4 times as long); its AMX and AMD's are faster
            vectors = abilities.get("avx512_bf16") and "intel" not in str(abilities.get("cpu_name", "")).lower()
            native = bool(vectors or abilities.get("amx_bf16"))
        precision = "bf16" if native else "fp32"
    memory = config.memory
    if memory.frozen == "auto":
        memory = dataclasses.replace(memory, frozen="bf16" if precision == "bf16" and torch.device(device).type == "cuda" else "fp32")
    if memory.frozen == "bf16" and precision != "bf16":
        raise UserError(f"memory.frozen: bf16 is for arithmetic in bf16, and precision is {precision}")
    return dataclasses.replace(config, device=device, precision=precision, memory=memory)


@dataclasses.dataclass
class Run:
    """Everything `build` made."""

    config: Config
    backbone: Any
    roles: Any
    trainer: Any
    real: Real | None  # what a discriminator sees


def assets(config: Config) -> Path | None:
    """The embedded world's, for a run on its teacher: its rewards know no other pictures."""
    from fewstep import world

    return world.ASSETS if config.teacher == "world" else None


def resolve_rewards(config: Config, functions: dict[str, Any]) -> dict[str, Any]:
    """The caller's functions with those that flags name and with the servers, which are asked who they are.

    Raises UserError, before anything slow, for a reward that nobody can make; hub ids in `config.scorer` get their commit.
    """
    from fewstep.rewards import REWARDS, sources
    from fewstep.rewards.address import is_remote

    found = dict(functions)
    for name in config.reward:
        scorer = config.scorer.get(name)
        if name in functions or name == "discriminator":
            continue
        try:
            if sources.is_code(scorer):
                found[name] = sources.load_function(scorer)
            elif is_remote(scorer):
                from fewstep.rewards.remote import Remote

                found[name] = Remote(scorer, name, timeout=config.remote.timeout).connect()
            elif name in REWARDS:
                located = sources.locate(name, scorer, assets=assets(config))
                if scorer is not None:
                    config.scorer[name] = located
            else:
                known = [*REWARDS, "discriminator"]
                hint = sources.own_hint(f"--reward.{name} WEIGHT --scorer.{name}", resume=config.resume)
                raise UserError(f"{sentence(f'reward.{name}: unknown reward{nearest(name, known)}')} {hint}")
        except ValueError as error:
            raise UserError(f"{'reward' if scorer is None else 'scorer'}.{name}: {error}") from error
    if "discriminator" in config.reward and (config.discriminator.latents is None and config.teacher != "world"):
        raise UserError(
            "discriminator.latents: give a folder of real pictures, or a safetensors file with their latents (only the embedded world "
            "brings its own)"
        )
    latents = config.discriminator.latents
    if latents is not None and not Path(latents).exists():
        from fewstep.evaluate.sets import hub_parts

        if Path(latents).suffix == ".safetensors":
            raise UserError(f"discriminator.latents: {latents}: no such file")
        try:
            hub_parts(latents)
        except ValueError as error:
            raise UserError(f"discriminator.latents: {error}") from error
    return found


def real_latents(config: Config, backbone: Any, shapes: list[tuple[int, int, int]], *, progress: bool) -> Real:
    """The real pictures' latents that the discriminator sees, for each of the shapes that the run trains at. Raises UserError."""
    from fewstep import latents, world
    from fewstep.rewards import sources

    source = config.discriminator.latents
    try:
        if source is None:
            found = latents.Real([world.latents()], sources.version(str(world.ASSETS / "latents.safetensors")))
        elif Path(source).is_file():
            found = latents.Real([latents.of_file(Path(source))], sources.version(source))
        else:
            sizes = [size or backbone.default_size() for size in config.sizes()]
            found = latents.of_pictures(source, backbone, sizes, progress=progress)
    except ValueError as error:
        raise UserError(f"discriminator.latents: {error}") from error
    held = [tuple(each.shape[1:]) for each in found.latents]
    for shape in shapes:
        if shape not in held:
            raise UserError(
                f"discriminator.latents: {source or 'the embedded world'} has latents of {held[0]}, and this run trains with {shape}; give "
                "a folder of pictures, which are encoded for every size"
            )
    return found


def resolve_judges(config: Config, functions: dict[str, Any], rewards: dict[str, Any]) -> dict[str, Any]:
    """The caller's own judges with those that flags name, as functions of pictures and prompts; the named ones are built with the run.

    rewards: as `resolve_rewards` found them. Raises UserError, before anything slow, for one that nobody can make, and for a judge that is
    what the student is trained on, under whatever name, path or address.
    """
    from fewstep.rewards import REWARDS, sources
    from fewstep.rewards.address import check_url, is_remote

    def not_trained_on(judge: list[Any], what: str, instead: str = "") -> None:
        reward = next((name for name, others in trained().items() if any(is_same(one, two) for one in judge for two in others)), None)
        if reward is not None:
            raise ValueError(f"{what} is what the student is trained on, as the reward {reward!r}; a judge is held out{instead}")

    @cache  # a folder's weights are read for it, and by no judge that is the world's own twin
    def trained() -> dict[str, list[Any]]:
        known = {}
        for name, scorer in ((name, config.scorer.get(name)) for name in config.reward):
            try:
                if name in rewards:
                    known[name] = known_of(rewards[name], scorer)
                elif name in REWARDS:
                    known[name] = known_of(None, sources.locate(name, scorer, assets=assets(config)), weights=weights)
            except (OSError, ValueError) as error:
                raise UserError(f"scorer.{name}: {error}") from error
        return known

    found, weights = dict(functions), not config.dry_run  # which reads none
    if functions and not config.reward:
        raise UserError("judge: nothing to judge: add a reward")
    for name, source in (dict.fromkeys(functions) | config.judge).items():
        try:
            if name in functions:
                not_trained_on(known_of(functions[name]), "it")
            elif is_remote(source):
                not_trained_on([check_url(str(source))], str(source))
                found[name] = sources.open_judge(name, source, timeout=config.remote.timeout)
                instead = ". A server of another model has to state another version"
                not_trained_on(known_of(found[name]), f"{source}, by the name and version that it states,", instead)
            elif sources.is_code(source):
                found[name] = sources.open_judge(name, source)
                instead = ". A file that scores with another model has to differ in a line"
                not_trained_on(known_of(found[name], source), str(source), instead)
            elif source == HELD_OUT:
                from fewstep import world

                if assets(config) is None:
                    raise ValueError(
                        f"only the embedded world has {HELD_OUT} twins of its own; give a folder or hub id, a function, a server"
                    )
                world.held_out(name)
            elif name in REWARDS:
                located = sources.locate(name, source, assets=assets(config), flag=f"--judge.{name}")
                not_trained_on(known_of(None, located, weights=weights), located)
                if source is not None:
                    config.judge[name] = located
            else:
                raise UserError(unknown_judge(name))
        except (OSError, ValueError) as error:
            raise UserError(f"judge.{name}: {error}") from error
    return found


def unknown_judge(name: str) -> str:
    """What is said of a judge that no table has, and no function or server is given for."""
    from fewstep.rewards import REWARDS, sources

    return f"{sentence(f'judge.{name}: unknown reward{nearest(name, REWARDS)}')} {sources.own_hint(f'--judge.{name}')}"


def known_of(function: Any, source: str | None = None, *, weights: bool = True) -> list[Any]:
    """All that a reward or judge is known by, any of which makes two of them one: the function itself, the place or address that it is
    from, the version that a server of it states, and, where `weights` are to be read, that of a folder."""
    from fewstep.rewards import sources
    from fewstep.rewards.address import check_url, is_remote

    known = [] if function is None else [function, *stated_by(function)]
    if is_remote(source):
        known.append(check_url(str(source)))
    elif sources.is_code(source):
        known.append(sources.function_version(str(source)))
    elif function is None and source is not None:
        known += [place_of(source), *([sources.weights_version(source)] if weights else [])]
    return known


def stated_by(function: Any) -> list[str]:
    """What the server behind a function states: its name with its version, and the version alone where that tells the model whatever its
    name. Nothing where there is no server."""
    from fewstep.rewards.sources import is_of_content

    server = getattr(function, "__self__", function)  # a judge is its bound `ask`
    served, version = getattr(server, "served", None), getattr(server, "version", None)
    if not (served and version):
        return []
    return [f"{served} {version}", *([version] if is_of_content(version) else [])]


def is_same(judge: Any, reward: Any) -> bool:
    """Whether two functions, places, addresses or versions are one; a method is made anew each time that it is looked up."""
    return judge is reward or (isinstance(judge, (str, MethodType)) and judge == reward)


def place_of(located: str) -> str:
    """The folder of a located source whatever the path to it, or the hub id as it is."""
    path = Path(located).expanduser()
    return str(path.resolve()) if path.exists() else located


def make_judges(config: Config, functions: dict[str, Any]) -> dict[str, Any]:
    """Functions of (images, prompts) by judge. Raises UserError."""
    from fewstep import world
    from fewstep.rewards import sources

    judges = dict(functions)
    for name, source in config.judge.items():
        if name in functions:
            continue
        try:
            if source == HELD_OUT:
                judges[name] = world.held_out(name, device=config.device)
            else:
                judges[name] = sources.open_judge(name, source, assets=assets(config), device=config.device)
        except (OSError, ValueError) as error:
            raise UserError(f"judge.{name}: {error}") from error
    return judges


def make_terms(config: Config, roles: Any, functions: dict[str, Any], real: Real | None) -> dict[str, Any]:
    """The reward terms beside R_dm, by name. real: what a discriminator among them sees."""
    import torch

    from fewstep.cost import Counted
    from fewstep.rewards import sources
    from fewstep.rewards.base import as_reward
    from fewstep.types import Term

    terms = {}
    for name in config.reward:
        via = config.via.get(name, "pathwise")
        if name in functions:
            terms[name] = Term(Counted(as_reward(functions[name], name)), via=via)
        elif name == "discriminator":
            from fewstep.rewards.discriminator import Discriminator, Head

            assert real is not None
            half = torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16, enabled=config.precision == "bf16")
            with torch.no_grad(), half:  # as the trainer calls it: parts frozen in bf16 take no float32
                zero = torch.zeros(1, *real.latents[0].shape[1:], device=config.device)
                width = roles.teacher.features(zero, torch.ones(1, device=config.device), roles.teacher.uncond).shape[1]
            head = Head(width).to(config.device)
            own = config.fake
            terms[name] = Term(
                Discriminator(roles.teacher, head, *real.latents, t_range=config.matching.t_range),
                dict(head.named_parameters()), lr=config.discriminator.lr, decay=own.decay,
                betas=own.betas, updates=own.updates, on=own.on, max_norm=own.max_norm,
            )  # fmt: skip
        else:
            try:
                source = sources.locate(name, config.scorer.get(name), assets=assets(config))
                scorer = sources.build(name, source, device=config.device)
            except (OSError, ValueError) as error:
                raise UserError(f"scorer.{name}: {error}") from error
            terms[name] = Term(Counted(scorer), via=via)
    return terms


def training_grid(backbone: Any, config: Config) -> tuple[Any, list[tuple[int, int, int]]]:
    """(times, latent shapes) of a run. Raises UserError naming the key that this teacher, or what is installed, cannot do."""
    from fewstep.levels import density_named
    from fewstep.rewards.distribution import matching_integral
    from fewstep.trainer import optimizer_class

    matching, key = config.matching, "steps"
    try:
        times = backbone.times(config.steps)
        key = "size"
        latent_shapes = [backbone.latent_shape(size) for size in config.sizes()]
        key = "teacher"
        backbone.check_guidance(matching.guidance)
        key = "matching.t_range"
        if matching.score_weight == "matching":
            matching_integral(backbone.schedule(), matching.t_range, density_named(matching.level_density, shift=matching.shift))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    try:
        optimizer_class(config.memory.optimizer)
    except ImportError as error:
        raise UserError(str(error)) from error
    return times, latent_shapes


def say_what_looks_wrong(backbone: Any, config: Config, times: Any) -> None:
    """A line on a teacher that looks distilled to few steps and is guided, and one on a student whose first prediction bf16 is too coarse
    for. times: of the student's steps (K,), the noisiest first."""
    few = backbone.few_step_scheduler()
    if few and config.matching.guidance != 1:
        print(
            f"{config.teacher}: its scheduler, {few}, is one of teachers distilled to few steps (SD-Turbo, SDXL-Turbo, Lightning, LCM, a "
            "student), which are not made to be guided, and this run has it under "
            f"guidance {config.matching.guidance_in_words()}: if it is one, set --matching.guidance 1 and --teacher-guidance 1"
        )
    signal = float(backbone.schedule().alpha(times[:1]))
    if backbone.prediction == "epsilon" and signal < FAINT and config.precision == "bf16":
        print(
            f"{config.teacher}: its network predicts the noise, and the student's first step divides by the picture's share of its first "
            f"noise level, {signal:.2g}: rounding to bf16 alone makes an error of {ROUNDING / signal:.2g} of a latent's standard deviation "
            "there, in training and in a student that is saved in bf16. --precision fp32 is slower and without it"
        )


def check_processes(config: Config, size: int) -> None:
    """Raises UserError where `size` processes cannot share a run's batches: the batch never changes with their number."""
    if config.groups % size:
        even = [n for n in range(1, config.groups + 1) if config.groups % n == 0]
        near = [max(n for n in even if n < size), *(n for n in even if n > size)][:2]
        raise UserError(
            f"groups: {size} processes cannot share {config.groups} groups evenly; start {' or '.join(map(str, near))}, "
            f"or set --groups to a multiple of {size}"
        )
    if size > 1 and config.device not in ("auto", "cuda", "cpu"):
        instead = "give --device auto" if config.resume else "leave it out"  # what the run had would stay
        raise UserError(f"device: {config.device} is one device and there are {size} processes, each of which takes its own: {instead}")


def build(
    config: Config,
    prompts: list[str],
    source: str,
    functions: dict[str, Any] | None = None,
    judges: dict[str, Any] | None = None,
    *,
    ranks: Ranks | None = None,
) -> Run:
    """Make teacher, student, fake, rewards and trainer from a config. Deterministic given `config.seed`.

    functions: rewards of the caller's own, by the name that `config.reward` weighs them under; judges: held-out ones, by name; ranks: the
    processes that make the run together.
    """
    import torch

    from fewstep import models
    from fewstep.cost import Counted
    from fewstep.prompts import Batches
    from fewstep.ranks import Ranks
    from fewstep.rewards.distribution import DistributionMatching
    from fewstep.rewards.remote import server_of
    from fewstep.student import Student
    from fewstep.trainer import Trainer
    from fewstep.types import Term
    from fewstep.weights import Adaptive, Fixed

    config = resolve_hardware(config)
    device, ranks = config.device, ranks or Ranks()
    take(device)
    torch.manual_seed(config.seed)
    try:
        backbone = models.load(source, device=device, dtype=models.frozen_dtype(config))
    except models.UnsupportedTeacher as error:
        raise UserError(f"teacher: {error}") from error
    times, latent_shapes = training_grid(backbone, config)  # before the prompts are encoded, which may take hours
    try:
        backbone.check_decoder()
    except ValueError as error:
        raise UserError(f"teacher: {source}: {error}") from error
    say_what_looks_wrong(backbone, config, times)
    conditioned = config.fake.condition == "step" and config.steps > 1
    guidance, negative_prompt = config.matching.guidance, config.matching.negative_prompt
    batches, real = Batches(prompts, config.groups, config.group_size, seed=config.seed), None
    with ranks.first_on_its_machine():
        if "discriminator" in config.reward:
            real = real_latents(config, backbone, latent_shapes, progress=ranks.rank == 0)
    ahead = batches.ahead(config.batches())  # of a large set most are never drawn
    backbone.prepare(ahead[place() :: neighbours()], negative_prompt=negative_prompt, sharers=neighbours())
    ranks.barrier()
    try:
        roles = backbone.roles(
            lora_rank=config.lora_rank, fake_steps=config.steps if conditioned else 0, guidance=guidance,
            negative_prompt=negative_prompt, checkpointing=config.memory.checkpointing,
            int8_teacher=config.memory.teacher == "int8", compiled=config.compile,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error
    except ImportError as error:
        raise UserError(str(error)) from error
    told = {key: value for key, value in dataclasses.asdict(config.matching).items() if key != "negative_prompt"}  # the teacher has it
    if backbone.embedded_guidance is not None:
        told["guidance"] = 1.0  # the network itself is told its scale (FLUX.1)
    elif config.matching.guidance_range is not None:
        told["guidance"] = None  # each sample's own
    schedule = backbone.schedule()
    matching = DistributionMatching(roles.teacher, roles.fake, schedule, **told, step_condition=conditioned)
    fake = config.fake
    term = Term(
        matching, roles.fake_parameters, lr=fake.lr, decay=fake.decay, betas=fake.betas, updates=fake.updates, on=fake.on,
        max_norm=fake.max_norm, anchor=True,
    )  # fmt: skip
    own = config.weights
    weights = Fixed(config.reward)
    if own.mode == "adaptive":
        weights = Adaptive(config.reward, own.budget, own.warmup, eta=own.eta, cap=own.cap, lag_limit=own.lag_limit)
    others, decoder = make_terms(config, roles, functions or {}, real), Counted(backbone.decode)
    built_judges = make_judges(config, judges or {})
    asked = {**(functions or {}), **{f"judge.{name}": judge for name, judge in built_judges.items()}}
    counted = {"student": roles.student, "teacher": roles.teacher, "fake": roles.fake, "decoder": decoder}
    trainer = Trainer(
        Student(roles.student, schedule, times),
        roles.student_parameters,
        {"dm": term, **others},
        batches,
        encode=backbone.encode,
        decode=decoder,
        latent_shapes=latent_shapes,
        config=config,
        device=device,
        weights=weights,
        counted=counted | {name: other.reward for name, other in others.items() if isinstance(other.reward, Counted)},
        judges=built_judges,
        news={name: server.news for name, function in asked.items() if (server := server_of(function)) is not None},
        ranks=ranks,
    )
    return Run(config, backbone, roles, trainer, real)
