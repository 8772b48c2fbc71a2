"""What --dry-run says a run needs is what the run then has: bytes of its networks, of what autograd keeps, network evaluations."""

import dataclasses
import gc
import json
import sys
import weakref

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from pipelines import INCOMPLETE, PIPELINES
from test_trainer import run_of

from fewstep import checkpoint, cli, composition, flags, models, needs
from fewstep.config import LAG_EVERY
from fewstep.cost import flops
from fewstep.evaluate import drawing

every_family = pytest.mark.parametrize("name", PIPELINES | INCOMPLETE)


def config_of(*options):
    config = flags.parse_config(["--device", "cpu", "--precision", "fp32", "--groups", "2", "--group-size", "2", *options])
    return composition.resolve_hardware(config)


def small(backbone):
    edge = max(8, backbone.size_step())
    return f"[{edge}x{2 * edge}]"


def kept_by_autograd(roles, own, network, *inputs):
    sizes = {}

    def keep(x):
        if x.untyped_storage()._cdata not in own:
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = network(*inputs)
    assert output.requires_grad
    return sum(sizes.values())


@every_family
@pytest.mark.parametrize("rank", ["0", "2"])
def test_networks_optimizers_and_activations_of_every_family(teachers, name, rank, monkeypatch):
    """By configurations alone, beside the real thing in memory."""
    monkeypatch.setattr("fewstep.models.sd.SHORT", 0)  # fused attention, as on a GPU
    source = str(teachers / name)
    backbone = models.load(source)
    config = config_of("--teacher", source, "--lora-rank", rank, "--size", small(backbone), "--matching.guidance", "1")
    found = needs.measure(source, config, prompts=7)
    decoder, text = (sum(p.nbytes for m in part for p in m.parameters()) for part in ([backbone.pipe.vae], backbone.text_modules()))
    network = sum(p.nbytes for p in backbone.model.parameters())
    roles = backbone.roles(lora_rank=int(rank), fake_steps=config.steps)
    assert (found.decoder, found.text) == (decoder, text)
    assert found.networks == sum(p.nbytes for p in {id(p): p for role in roles[:3] for p in role.parameters()}.values())
    student, fake = (sum(p.nbytes for p in parameters.values()) for parameters in roles[3:])
    assert found.gradients == student + fake and found.optimizer == 2 * (student + fake) + student
    assert found.trained == sum(p.numel() for p in roles.student_parameters.values())
    own = {x.untyped_storage()._cdata for x in [*roles.student.parameters(), *roles.student.buffers()]}
    # all lies in one memory on a CPU, whatever the phase
    assert found.encoding == network + text + decoder
    there = found.networks + found.optimizer + found.conditions + text + decoder
    assert found.drawing == there + student + max(found.drawn, found.one_picture)
    assert found.training == there + found.gradients + found.activations and found.pictures == 0
    assert found.saving == there + max(found.writing, found.exporting) and found.writing == 4 * (student + fake) - fake
    with needs.Peak(made := [p for role in roles[:3] for p in (*role.parameters(), *role.buffers())]) as peak:
        checkpoint.pack(made)
    assert peak.bytes == sum(x.nbytes for x in made)  # a checkpoint is a copy of what it holds, and no more
    with needs.Peak(made) as peak:
        average = {name: p.detach().clone() for name, p in roles.student_parameters.items()}
        backbone.student_pipeline(roles, average, config.steps)
    layer = max(p.nbytes for p in backbone.model.parameters())  # adapters are merged a layer at a time
    tables = sum(x.nbytes for m in roles.student.modules() for x in vars(m).values() if isinstance(x, torch.Tensor))  # a few megabytes
    assert found.exporting <= peak.bytes <= found.exporting + 3 * layer + 2 * tables
    noise = torch.randn(4, *backbone.latent_shape(config.sizes()[0]))
    cond = backbone.random_conditions(4)
    real = kept_by_autograd(roles, own, roles.student.network, noise, torch.full((4,), 500.0), cond)
    assert found.activations == pytest.approx(real, rel=0.1)
    # a grid's pictures that pass together, the teacher's each twice where it is guided by a second prediction
    n = drawing.GRID_BATCH * (1 if backbone.embedded_guidance else 2)
    given = torch.randn(n, *noise.shape[1:]), torch.full((n,), 500.0), backbone.random_conditions(n)
    with torch.no_grad(), needs.Peak([*roles.student.parameters(), *roles.student.buffers(), *given[:2], *given[2].values()]) as peak:
        roles.student.network(*given)
    assert found.drawn == pytest.approx(peak.bytes, rel=0.1)


@pytest.mark.parametrize("options", [("--lora-rank", "0"), ("--lora-rank", "2", "--memory.frozen", "bf16")])
def test_copies_of_weights_that_autocast_keeps_are_counted(teachers, options):
    """Of weights in float32 they take half as much again."""
    source = str(teachers / "StableDiffusion3Pipeline")
    config = config_of("--teacher", source, "--precision", "bf16", "--groups", "1", "--group-size", "1", "--size", "[8x8]", *options)
    backbone = models.load(source, dtype=models.frozen_dtype(config))
    roles = backbone.roles(lora_rank=config.lora_rank, fake_steps=config.steps)
    network, noise = roles.student.network, torch.randn(1, *backbone.latent_shape((8, 8)))
    own = {x.untyped_storage()._cdata for x in [*network.parameters(), *network.buffers()]}
    with torch.autocast("cpu", torch.bfloat16):
        real = kept_by_autograd(roles, own, network, noise, torch.full((1,), 500.0), backbone.random_conditions(1))
    assert needs.measure(source, config, 7).activations == pytest.approx(real, rel=0.1)


@every_family
def test_pictures_of_every_family(teachers, name):
    """What decoding a part with its gradient keeps, and decoding one picture without, beside the real thing in memory."""
    source = str(teachers / name)
    backbone = models.load(source)
    vae, config = backbone.pipe.vae, config_of("--teacher", source, "--lora-rank", "2", "--size", small(backbone), "--reward.clip", "1")
    shape = backbone.latent_shape(config.sizes()[0])
    found = needs.measure(source, config, prompts=7)
    own = {x.untyped_storage()._cdata for x in [*vae.parameters(), *vae.buffers()]}
    real = kept_by_autograd(None, own, backbone.decode, torch.randn(4, *shape, requires_grad=True))
    assert found.pictures == pytest.approx(real, rel=0.1)
    with torch.no_grad(), needs.Peak([*vae.parameters(), *vae.buffers()]) as peak:
        backbone.decode(torch.randn(1, *shape))
    assert found.one_picture == pytest.approx(peak.bytes, rel=0.1) and found.one_picture < found.pictures


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "PixArtSigmaPipeline"])
def test_operations_of_an_adapter_are_those_of_both_its_products(teachers, name, monkeypatch):
    """However they are made: added to the layer's output in place, or, as peft does it, one after the other."""
    source = str(teachers / name)
    config = config_of("--teacher", source, "--lora-rank", "2", "--size", "[16x16]")
    found = needs.operations(source, config)
    monkeypatch.setattr("fewstep.models.lora.AddedLinear.forward", LoraLinear.forward)
    assert found == needs.operations(source, config)


def test_the_most_that_lives_at_once():
    held = torch.zeros(10)  # 40 bytes
    with needs.Peak([held]) as peak:
        view = held[2:].view(4, 2)  # of what is there already
        assert peak.bytes == 0
        made = view + 1  # 32
        made = made * 2  # 32 more, then the first is gone
        twice = torch.cat([made, made])  # 64
    assert peak.bytes == 96 and peak.live == 96
    del made, twice
    assert peak.live == 0


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--reuse.rollout", "2"),
        ("--reuse.evaluation", "2", "--reuse.min-ess", "0"),
        ("--reuse.evaluation", "2", "--reuse.min-ess", "1", "--reward.redness", "0.3"),
        ("--matching.guidance", "1"),
        ("--matching.draws", "2"),
        ("--fake.updates", "1"),
        ("--reward.contrast", "0.2", "--via.contrast", "policy", "--reuse.rollout", "2"),
        ("--reward.redness", "0.2", "--weights.mode", "adaptive", "--weights.warmup", "2"),
    ],
)
def test_network_evaluations_of_an_update(teacher_folder, prompt_file, options):
    moving = ("--updates", "1000")  # a student that stands still, as at the end, is one that every evaluation still serves
    run = run_of(teacher_folder, prompt_file, "--reuse.rollout", "1", "--precision", "fp32", *moving, *options)
    trainer, config = run.trainer, run.config
    for _ in range(2 * LAG_EVERY):
        trainer.step()
    expected = needs.passes(config, config.matching.guidance != 1)
    # an adaptive weight follows the lag of each rollout, but the first has none before it; else it is that of one in LAG_EVERY
    first = dict.fromkeys(("fake", "teacher"), 2 * (config.weights.mode == "adaptive"))
    for role, (forwards, backwards) in expected.items():
        found = [passes / 4 for passes in trainer.passes()[role]]  # of each of the four samples
        assert found == pytest.approx([2 * LAG_EVERY * forwards - first.get(role, 0), 2 * LAG_EVERY * backwards], abs=1e-9), role


def test_a_discriminator_simulates_batches_of_its_own():
    simulating = ("--reuse.backward-simulation", "--reuse.rollout", "1", "--fake.updates", "3")
    alone, beside = (needs.passes(config_of(*simulating, *more), True) for more in ((), ("--reward.discriminator", "0.1")))
    assert beside["student"][0] - alone["student"][0] == 3 * (4 + 1) / 2
    assert beside | {"student": None} == alone | {"student": None}


def test_a_refused_evaluation_costs_a_prediction_more(teacher_folder, prompt_file):
    refusing = ("--updates", "1000", "--reuse.rollout", "1", "--reuse.evaluation", "2", "--reuse.min-ess", "1")
    run = run_of(teacher_folder, prompt_file, "--precision", "fp32", *refusing)
    spent = []
    for _ in range(1 + LAG_EVERY):
        run.trainer.step()
        spent.append(run.trainer.passes())
    for role, each in needs.passes(run.config, True).items():
        found = [(after - before) / 4 / LAG_EVERY for before, after in zip(spent[0][role], spent[-1][role], strict=True)]
        assert tuple(found) == each, role


@pytest.mark.parametrize("rank", [0, 2])
def test_operations_of_an_update(teachers, rank):
    """Each role's passes times what its own cost: the teacher's without the adapter, backward as autograd makes it."""
    source = str(teachers / "StableDiffusion3Pipeline")
    adaptive = ("--weights.mode", "adaptive", "--reward.clip", "1")
    config = config_of("--teacher", source, "--lora-rank", str(rank), "--size", "[16x16]", *adaptive)
    backbone = needs.skeleton(source, torch.float32)  # without numbers: torch's kernels for a CPU hide attention's operations
    roles = backbone.roles(lora_rank=rank, fake_steps=config.steps)
    x, t = torch.zeros(1, *backbone.latent_shape((16, 16)), device="meta"), torch.zeros(1, device="meta")
    given = (x, t, backbone.random_conditions(1))

    def both():
        with torch.enable_grad():
            roles.student.network(*given).sum().backward()

    teacher, student = (flops(lambda role=role: role.network(*given)) for role in roles[:2])
    backward = flops(both) - student
    # K of the rollout and the prediction; two of the guided teacher, and the lag's two of teacher and fake; R_dm's, and its updates
    forward = 4 * student + student + (2 + 2) * teacher + (1 + 2 + config.fake.updates) * student
    assert needs.operations(source, config) == 4 * (forward + (1 + config.fake.updates) * backward)
    assert student > teacher if rank else student == teacher
    assert 1 < backward / student < 2 if rank else backward / student == pytest.approx(2, rel=0.1)


def test_what_is_turned_changes_what_is_needed(teachers):
    source = str(teachers / "StableDiffusion3Pipeline")
    config = config_of("--teacher", source, "--precision", "bf16", "--size", "[32x32]")
    plain = needs.measure(source, config, 7)

    def with_memory(**changes):
        return needs.measure(source, dataclasses.replace(config, memory=dataclasses.replace(config.memory, **changes)), 7)

    assert with_memory(micro_groups=1).activations == pytest.approx(plain.activations / 2, rel=0.02)
    assert with_memory(checkpointing=True).activations < 0.8 * plain.activations
    assert with_memory(optimizer="adamw8bit").optimizer < 0.6 * plain.optimizer
    halved = with_memory(frozen="bf16")
    assert (halved.decoder, halved.student_folder) == (plain.decoder / 2, plain.student_folder / 2)
    assert with_memory(teacher="int8").networks < plain.networks
    assert needs.measure(source, dataclasses.replace(config, lora_rank=2), 7).device < plain.device
    rewarded = dataclasses.replace(config, reward={"clip": 1.0})
    scaling = dataclasses.replace(rewarded, weights=dataclasses.replace(config.weights, mode="advantage"))
    assert needs.measure(source, scaling, 7).pictures < needs.measure(source, rewarded, 7).pictures  # no gradient in them


def test_a_gpu_holds_in_each_phase_what_the_run_places_there(teachers, monkeypatch):
    monkeypatch.setattr(needs, "activations", lambda *args: 1000)  # of tiny weights they are nearly all there is
    monkeypatch.setattr(needs, "decoding", lambda *args, grad: 100 if grad else 10)
    monkeypatch.setattr(needs, "drawing", lambda *args: 30)
    source = str(teachers / "StableDiffusion3Pipeline")
    config = dataclasses.replace(config_of("--teacher", source, "--size", "[16x16]", "--lora-rank", "2"), device="cuda")
    plain, looking, apart = (
        needs.measure(source, dataclasses.replace(config, reward=reward), 7) for reward in ({}, {"clip": 1.0}, {"discriminator": 1.0})
    )
    throughout = plain.networks + plain.optimizer + plain.conditions
    assert plain.saving == 0  # it takes main memory
    base = plain.encoding - plain.text  # all is read there, and what is not needed throughout waits there
    assert plain.reading == base + plain.text + plain.decoder and plain.resting == plain.text + plain.decoder
    assert looking.resting == plain.text and needs.measure(source, dataclasses.replace(config, device="cpu"), 7).resting == 0
    assert plain.training == apart.training == throughout + plain.gradients + plain.activations
    assert looking.training == plain.training + plain.decoder
    assert plain.encoding < plain.networks + plain.text  # the adapters come after it
    # here the samples take the most: what fits in training alone does not fit
    assert plain.device == plain.drawing == looking.drawing > throughout + plain.text + plain.decoder + 30 > plain.training
    half = dataclasses.replace(config, precision="bf16", memory=dataclasses.replace(config.memory, frozen="bf16"))
    drawn = needs.measure(source, half, 7)
    student = drawn.optimizer - 2 * drawn.gradients
    rest = drawn.networks + drawn.optimizer + drawn.conditions + drawn.text + drawn.decoder
    assert drawn.drawing == rest + student + student // 2 + 30  # autocast's copies of what is trained in float32
    # pictures come before the gradients, and beside the graph of a batch in one part
    many = 10 * plain.gradients
    monkeypatch.setattr(needs, "decoding", lambda *args, grad: many if grad else 10)
    seen = dataclasses.replace(config, reward={"clip": 1.0})
    parts = dataclasses.replace(seen, memory=dataclasses.replace(seen.memory, micro_groups=1))
    assert needs.measure(source, seen, 7).training == throughout + plain.decoder + many + 1000
    assert needs.measure(source, parts, 7).training == throughout + plain.decoder + many
    policy = needs.measure(source, dataclasses.replace(seen, via={"clip": "policy"}), 7)
    assert policy.training == plain.training + plain.decoder and policy.pictures == 10
    monkeypatch.setattr(needs, "capacity", lambda device: (plain.training / 0.9, "a GPU"))
    assert "conditions of 1 prompt\n" in needs.report(source, config, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = needs.report(source, config, 7).splitlines()
    assert any(
        line.startswith("  and for each of the 2 processes here, with what waits there to be needed on the device: 0.") for line in told
    )
    assert sum("DOES NOT FIT" in line for line in told) == 1 and any("while samples are drawn" in line for line in told)
    assert not any("--memory.checkpointing" in line or "micro-groups" in line for line in told)  # which would not help


def test_a_gpu_with_room_is_told_of_larger_parts(teachers, monkeypatch):
    source = str(teachers / "StableDiffusion3Pipeline")
    config = config_of("--teacher", source, "--size", "[32x32]", "--groups", "8", "--memory.micro-groups", "1")
    needed = {
        n: needs.measure(source, dataclasses.replace(config, memory=dataclasses.replace(config.memory, micro_groups=n)), 7).training
        for n in (1, 3, 4, 8)
    }
    at_once = dataclasses.replace(config, memory=dataclasses.replace(config.memory, micro_groups=0))

    def told(total, config):
        monkeypatch.setattr(needs, "capacity", lambda device: (total, "a GPU"))
        return [line for line in needs.report(source, config, 7).splitlines() if "room for" in line]

    for n, room in ((3, needed[3] + needed[4]), (8, 3 * needed[8])):
        on_gpu = dataclasses.replace(config, device="cuda")
        assert told(room / 2 / 0.9, on_gpu) == [
            f"  room for --memory.micro-groups {n}: fewer and larger passes, for which a GPU waits less"
        ]
    assert not told(needed[1] / 0.9, on_gpu) and not told(3 * needed[8], dataclasses.replace(at_once, device="cuda"))
    assert not told(3 * needed[8], config)


def test_what_does_not_fit_is_told_what_to_change(teachers, monkeypatch):
    """Alone, marked where that is enough, else as many together as it takes, those first that cost least; or that nothing is enough."""
    source = str(teachers / "StableDiffusion3Pipeline")
    config = config_of("--teacher", source, "--precision", "bf16", "--group-size", "4", "--lora-rank", "64", "--size", "64x32,32x64")
    zeros = needs.Needs(**dict.fromkeys(needs.Needs._fields, 0))

    def measure(source, config, prompts):
        memory, half = config.memory, config.size == ["32x16", "16x32"]
        networks = 8 if memory.frozen == "bf16" else 16
        working = 8 * config.group_size // (1 + memory.checkpointing) + config.lora_rank // 16 - (memory.optimizer != "adamw")
        drawing = 60 if networks == 16 else 12
        phases = {"training": networks + working - 2 * half, "drawing": drawing - half, "networks": networks, "text": 3}
        return zeros._replace(**{name: value * needs.GIB for name, value in phases.items()})

    monkeypatch.setattr(needs, "measure", measure)

    def said(room, config=config):
        return [line.strip() for line in needs.advice(source, config, 7, measure(source, config, 7), room * needs.GIB)]

    # drawing needs the most, so what is saved in training alone is not seen
    smaller = "(a teacher draws worse far below its own size)"
    small = f"59.00 GiB with --size 32x16,16x32 {smaller}"
    assert said(45) == ["44.00 GiB with --memory.frozen bf16, which fits", small]
    told = ["44.00 GiB with --memory.frozen bf16", small]
    both = "--memory.frozen bf16 --memory.optimizer adamw8bit --memory.checkpointing"
    assert said(30) == [*told, f"27.00 GiB with {both}, which fits"]
    every = f"{both} --group-size 2 --lora-rank 16 --size 32x16,16x32 {smaller}"
    assert said(14) == [*told, f"14.00 GiB with {every}, which fits"]
    assert said(11) == [
        *told,
        f"14.00 GiB with {every}",
        "no setting known here makes it fit: 8.00 GiB are teacher, student and fake, 3.00 GiB the text encoders; give a smaller teacher, "
        "or a device with more memory",
    ]
    # full weights: LoRA shares the base, so int8 goes where it comes
    changes = needs.savings(source, dataclasses.replace(config, lora_rank=0))
    together = {name: value for change in changes for name, value in change.items()}
    told = needs.as_flags(config := dataclasses.replace(config, lora_rank=0), together)
    assert "--lora-rank 64" in told and "int8" not in told and not needs.turned(config, together).problems()
    # another rank is another network than that of the run that this one begins with, and a run that goes on keeps nearly all
    assert not any("lora_rank" in change for change in needs.savings(source, dataclasses.replace(config, init="out")))
    assert {*told.split()} > {"--lora-rank"} and needs.savings(source, dataclasses.replace(config, resume=True)) == [
        {"memory.micro_groups": 1}, {"memory.checkpointing": True}
    ]  # fmt: skip


def test_a_dry_run_reads_no_weights_and_writes_nothing(teachers, prompt_file, tmp_path, capsys, monkeypatch):
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(teachers / "StableDiffusionPipeline", teacher)
    for path in teacher.rglob("*.safetensors"):
        path.unlink()
    output = tmp_path / "out"
    call = ["distill", "--teacher", str(teacher), "--prompts", str(prompt_file), "--output", str(output), "--dry-run", "--device", "cpu"]
    assert cli.main(call) == 0
    told = capsys.readouterr().out
    said = ("as in the recipe sd", "M parameters; LoRA of rank 64", "activations", "on disk", "\nfits: ")
    assert all(words in told for words in said)
    assert not output.exists()
    monkeypatch.setattr(needs, "capacity", lambda device: (1000, "a very small device"))
    full = ["--lora-rank", "0", "--memory.checkpointing", "false", "--precision", "fp32"]  # in bf16 training is not what needs most
    assert cli.main([*call, *full]) == 0
    told = capsys.readouterr().out
    assert "M parameters; full weights" in told
    assert "DOES NOT FIT: a very small device" in told
    assert all(f"GiB with --memory.{flag}\n" in told for flag in ("micro-groups 1", "checkpointing", "optimizer adamw8bit"))
    assert "--lora-rank 64" not in told  # more than all of these tiny weights
    assert "no setting known here makes it fit: 0.00 GiB are teacher" in told.splitlines()[-1]
    assert "less than said" not in told
    from transformers import BitsAndBytesConfig

    described = teacher / "text_encoder" / "config.json"
    packed = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True).to_dict()}
    described.write_text(json.dumps(json.loads(described.read_text()) | packed))
    assert cli.main(call) == 0
    told = capsys.readouterr().out
    assert "\nless than said: text_encoder counts as in its full bits" in told and "more than said" not in told
    config = dataclasses.replace(config_of("--teacher", str(teacher)), device="cuda")
    assert "\nmore than said in training: on a GPU it stays there" in needs.report(str(teacher), config, 7)


def test_a_dry_run_keeps_nothing_in_memory(teacher_folder, monkeypatch):
    made, skeleton = [], needs.skeleton

    def watched(*told):
        backbone = skeleton(*told)
        made.extend(weakref.ref(part) for part in (backbone.model, *backbone.model.parameters()))
        return backbone

    monkeypatch.setattr(needs, "skeleton", watched)
    needs.measure(str(teacher_folder), config_of("--teacher", str(teacher_folder), "--lora-rank", "2"), prompts=3)
    gc.collect()
    assert made and not any(part() is not None for part in made)


def test_a_dry_run_refuses_what_the_run_would(teachers, prompt_file, tmp_path, capsys, monkeypatch):
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(teachers / "StableDiffusionPipeline", teacher)

    def said(*options):
        call = ["distill", "--teacher", str(teacher), "--prompts", str(prompt_file), "--dry-run", "--output", str(tmp_path / "out")]
        assert cli.main([*call, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "steps: " in said("--steps", "3")
    assert "size: " in said("--size", "[9x16]")
    flow = ("--teacher", str(teachers / "StableDiffusion3Pipeline"))  # whose last noise level has no signal
    assert "error: matching.t_range: score_weight='matching' needs some signal" in said(*flow, "--matching.t_range", "[0.02,1.0]")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.optim", None)
        assert "needs bitsandbytes" in said("--memory.optimizer", "adamw8bit")
    index = teacher / "model_index.json"
    whole = index.read_text()
    index.write_text(whole.replace('"UNet2DConditionModel"', '"Other"'))
    assert "unet cannot be read" in said()
    # a file in the folder names no module that is imported
    (tmp_path / "ours.py").write_text("raise SystemExit(7)")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = json.loads(whole)
    index.write_text(json.dumps(parts | {"unet": ["ours", "UNet"]}))
    assert "unet is a UNet of 'ours'" in said()
    index.write_text(whole)
    (teacher / "unet" / "config.json").unlink()
    assert "unet cannot be read" in said()


def test_a_dry_run_reads_no_part_that_a_run_does_not_compute_with(teachers, tmp_path):
    """As Stable Diffusion 1.5 has it: a feature extractor of a class that transformers has no more, for a safety checker."""
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(teachers / "StableDiffusionPipeline", teacher)
    index = teacher / "model_index.json"
    parts = {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    index.write_text(json.dumps(json.loads(index.read_text()) | parts))
    (teacher / "feature_extractor").mkdir()
    told = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}
    (teacher / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(told))
    skeleton, whole = needs.skeleton(str(teacher), torch.float32), models.load(str(teacher))
    assert skeleton.pipe.feature_extractor is None and skeleton.pipe.safety_checker is None is whole.pipe.safety_checker
    assert skeleton.model.config.block_out_channels == whole.model.config.block_out_channels


def test_a_tokenizer_may_be_a_sentencepiece_model_alone(teachers, tmp_path):
    """As PixArt-Sigma's: spiece.model and no tokenizer.json."""
    import shutil

    import sentencepiece

    teacher = shutil.copytree(teachers / "PixArtSigmaPipeline", tmp_path / "teacher")
    (teacher / "tokenizer" / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat", "two red hats", "a dog"] * 9), model_prefix=str(teacher / "tokenizer" / "spiece"), vocab_size=24,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    backbone = models.load(str(teacher))
    assert len(backbone.pipe.tokenizer("a red cat").input_ids) > 2
    assert needs.skeleton(str(teacher), torch.float32).pipe.tokenizer("a cat").input_ids == backbone.pipe.tokenizer("a cat").input_ids


def test_a_part_may_be_of_a_pipelines_own_module_in_diffusers(teachers, tmp_path, monkeypatch):
    """As Kolors' text encoder, whose configuration transformers does not know by its type."""
    import shutil

    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    class OwnConfig(CLIPTextConfig):
        model_type = "own_text_model"

    class Own(CLIPTextModel):
        config_class = OwnConfig

    teacher = shutil.copytree(teachers / "StableDiffusionPipeline", tmp_path / "teacher")
    index, config = teacher / "model_index.json", teacher / "text_encoder" / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": ["stable_diffusion", "Own"]}))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "own_text_model"}))
    monkeypatch.setattr(diffusers.pipelines.stable_diffusion, "Own", Own, raising=False)
    assert type(needs.skeleton(str(teacher), torch.float32).pipe.text_encoder) is Own
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": ["os", "Own"]}))
    with pytest.raises(models.UnsupportedTeacher, match="text_encoder is a Own of 'os'; parts of diffusers and transformers are known"):
        needs.skeleton(str(teacher), torch.float32)


def test_models_lists_every_family(capsys):
    assert cli.main(["models"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in models.FAMILIES)
    columns = {head: [row[at] for row in models.support()] for at, head in enumerate(models.SUPPORT)}
    without = {name for name, can in zip(columns["pipeline"], columns["negative prompt"], strict=True) if can == "no"}
    assert without == {"FluxPipeline", "Flux2KleinPipeline"}
    assert "embedded, 3.5; step-distilled: none" in columns["guidance"]
    assert cli.main(["models", "flux"]) == 2 and "takes no arguments" in capsys.readouterr().err
