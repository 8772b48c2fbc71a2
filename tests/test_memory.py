"""What a run trades for memory changes how an update is computed, not what it is."""

import contextlib
import copy
import importlib
from collections import Counter

import pytest
import small_run
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from pipelines import PIPELINES
from safetensors.torch import save_file
from small_run import SEVERAL
from test_ranks import assert_close
from test_trainer import assert_same, run_of
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import checkpoint, composition, flags, models, trainer
from fewstep.errors import UserError
from fewstep.models.lora import Adapters, AddedLinear
from fewstep.rewards.base import OnlineReward
from fewstep.types import Signal


@pytest.fixture
def plain_descent(monkeypatch):
    """Gradient descent in place of Adam, whose first steps turn the rounding of a gradient near zero into a whole step."""

    def descent(parameters, lr, betas, weight_decay):
        return torch.optim.SGD(parameters, lr=1000 * lr)

    monkeypatch.setattr(trainer, "optimizer_class", lambda name: descent)


def weights_of(loop):
    online = {f"{name}/{key}": p for name in loop.online for key, p in loop.terms[name].parameters.items()}
    return {name: p.detach().clone() for name, p in {**loop.parameters, **online}.items()}


def weights_after(teacher_folder, prompt_file, *options, updates=3):
    """(what is trained at the start, the same after some updates, the trainer)."""
    loop = run_of(teacher_folder, prompt_file, "--precision", "fp32", "--groups", "3", "--reuse.rollout", "2", *options).trainer
    start = weights_of(loop)
    for _ in range(updates):
        loop.step()
    return start, weights_of(loop), loop


def distance(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--lora-rank", "2"),
        ("--reward.redness", "0.3", "--reward.contrast", "0.2", "--via.contrast", "policy"),
        ("--reuse.rollout", "1", "--reuse.evaluation", "2", "--reuse.min-ess", "0"),
        ("--reuse.rollout", "1", "--reuse.evaluation", "3", "--reuse.min-ess", "1", "--reward.redness", "0.3"),
        ("--reuse.backward-simulation", "--reuse.rollout", "1"),
        ("--weights.mode", "sum", "--reward.redness", "3"),
    ],
    ids=["plain", "lora", "rewards", "evaluation-reuse", "asked-again", "backward-simulation", "sum"],
)
def test_an_update_in_parts_is_the_update(teacher_folder, prompt_file, plain_descent, options):
    start, whole, one = weights_after(teacher_folder, prompt_file, *options)
    again, parts, other = weights_after(teacher_folder, prompt_file, *options, "--memory.micro-groups", "2")
    assert len(one.parts(6)) == 1 and other.parts(6) == [slice(0, 4), slice(4, 6)]
    assert distance(start, again) == 0 and distance(whole, parts) < 1e-3 * distance(start, whole)
    assert one.counted["teacher"].cost == other.counted["teacher"].cost


@pytest.mark.parametrize(
    "options",
    [(), SEVERAL, (*SEVERAL, "--reuse.min-ess", "1", "--reuse.evaluation", "3"), ("--reward.discriminator", "0.5")],
    ids=["gndm", "rewards", "asked again", "discriminator"],
)
def test_a_run_goes_on_in_parts_and_whole_again(in_float64, tmp_path, options):
    """In the middle of a rollout, and of an evaluation: the unbroken whole run, to rounding."""
    whole = small_run.trainer_of(options)
    for _ in range(7):
        whole.step()
    for updates, parts in ((3, "0"), (3, "1"), (1, "0")):
        loop = small_run.trainer_of((*options, "--memory.micro-groups", parts))
        found = checkpoint.newest(tmp_path / "checkpoints")
        if found:
            loop.load_state(found[1])
        for _ in range(updates):
            loop.step()
        loop.save(tmp_path)
    states = loop.state(), whole.state()
    for state in states:  # but for what it costs: in parts a reused rollout's states are predicted once more
        del state["counted"]
        state["running"] = {key: value for key, value in state["running"].items() if not key.startswith("evaluations/")}
    assert_close(*states)


def test_a_reward_of_ones_own_says_in_parts_what_it_says_whole():
    class Own:
        def draw_for_call(self, sample):
            return {"noise": torch.randn_like(sample.x0)}

        def __call__(self, sample, *, noise):
            return Signal(noise.flatten(1).mean(1), noise)

    config, found = flags.parse_config(["--reward.own", "0.3"]), []
    (term,) = composition.make_terms(config, None, {"own": Own()}, None).values()
    for parts in ("0", "1"):
        loop = small_run.trainer_of(("--memory.micro-groups", parts))
        loop.roll_out()
        torch.manual_seed(0)
        found.append(loop.ask_in_parts({"own": term.reward}, loop.sample_of(loop.rollout, torch.zeros_like(loop.rollout.group)))["own"])
    whole, in_parts = found
    assert torch.equal(whole.score, in_parts.score) and torch.equal(whole.direction, in_parts.direction)


def test_a_checkpoint_hangs_on_nothing_that_saves_memory_or_time(teacher_folder, prompt_file):
    """`memory.checkpointing` and `compile` may change when a run goes on: its state has the same names."""
    plain = run_of(teacher_folder, prompt_file, "--lora-rank", "2").trainer
    plain.step()
    other = run_of(teacher_folder, prompt_file, "--lora-rank", "2", "--memory.checkpointing", "--compile").trainer
    other.load_state(copy.deepcopy(plain.state()))
    assert_same(plain.state(), other.state())


def test_no_more_than_a_part_passes_through_a_network_at_once(teacher_folder, prompt_file):
    loop = run_of(teacher_folder, prompt_file, "--groups", "3", "--memory.micro-groups", "1").trainer
    seen = []
    for role in ("student", "teacher", "fake"):
        loop.counted[role].network.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    loop.step()
    assert max(seen) == 2  # one group; the guided teacher's doubled batch in parts too


def test_an_online_reward_needs_no_draw_to_learn_in_parts(teacher_folder, prompt_file):
    """One with module and loss alone (base.OnlineReward) learns from parts what it learns from the whole."""
    loop = run_of(teacher_folder, prompt_file, "--precision", "fp32", "--groups", "3", "--memory.micro-groups", "2").trainer
    rollout = loop.new_rollout()
    sample = loop.sample_of(rollout, loop.online_step(rollout, "all"))

    class Learner:
        module = torch.nn.Linear(sample.x0[0].numel(), 1)

        def __call__(self, sample):
            return Signal(None, None)

        def loss(self, sample):
            return (self.module(sample.x0.flatten(1)) ** 2).mean()

    reward = Learner()
    assert isinstance(reward, OnlineReward)
    reward.loss(sample).backward()
    whole = reward.module.weight.grad.clone()
    reward.module.zero_grad()
    assert float(loop.online_loss(reward, sample)) == pytest.approx(float(reward.loss(sample).detach()), rel=1e-5)
    torch.testing.assert_close(reward.module.weight.grad, whole)


@pytest.mark.parametrize("rank", ["0", "2"])
def test_recomputed_activations_give_the_same_gradient(teacher_folder, prompt_file, plain_descent, rank):
    """With LoRA, teacher and fake use the base between the student's forward and backward."""
    options = ("--lora-rank", rank, "--reward.redness", "0.3", "--reuse.rollout", "1")
    start, kept, _ = weights_after(teacher_folder, prompt_file, *options)
    _, again, loop = weights_after(teacher_folder, prompt_file, *options, "--memory.checkpointing")
    assert loop.counted["student"].network.model.is_gradient_checkpointing
    assert distance(kept, again) < 1e-3 * distance(start, kept)


def test_a_block_is_computed_again_under_its_own_adapter(teacher_folder):
    """The mutant that leaves the base as the last role switched it."""
    backbone = models.load(str(teacher_folder))
    torch.manual_seed(0)
    roles = backbone.roles(lora_rank=2, checkpointing=True)
    for parameters in (roles.student_parameters, roles.fake_parameters):
        for parameter in parameters.values():
            parameter.data = 0.3 * torch.randn_like(parameter)
    noise, t, cond = torch.randn(2, *backbone.latent_shape()), torch.full((2,), 0.5), backbone.encode(["a cat", "a dog"])

    def gradient(between):
        out = roles.student(noise, t, cond).square().mean()
        between()
        # twice, as rewards go back through the picture that they share
        found = [torch.autograd.grad(out, list(roles.student_parameters.values()), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return found[0]

    alone = gradient(lambda: None)
    beside = gradient(lambda: roles.fake(noise, t, cond))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_comes_through_cudnns_attention(teachers, monkeypatch, checkpointing):
    """Nor where a block is computed again; passes without a gradient may use it."""
    backbone, seen = models.load(str(teachers / "StableDiffusion3Pipeline")), []
    roles, attend = backbone.roles(lora_rank=2, checkpointing=checkpointing), torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)

    given = torch.randn(1, *backbone.latent_shape((16, 16))), torch.full((1,), 0.5), backbone.encode(["a cat"])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with torch.no_grad():
        roles.teacher(*given)
    assert seen and all(seen)
    passes = len(seen)
    seen.clear()
    roles.student(*given).sum().backward()
    assert len(seen) == (2 if checkpointing else 1) * passes and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def saved_for_backward(function):
    """(what the function returns, bytes of the tensors that its graph keeps)."""
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (held.append(x.untyped_storage()), x)[1], lambda x: x):
        out = function()
    return out, sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def test_activations_are_what_checkpointing_saves(teacher_folder):
    def kept(checkpointing):
        backbone = models.load(str(teacher_folder))
        roles = backbone.roles(checkpointing=checkpointing)
        noise, t, cond = torch.randn(2, *backbone.latent_shape()), torch.full((2,), 0.5), backbone.encode(["a cat", "a dog"])
        return saved_for_backward(lambda: roles.student(noise, t, cond))[1]

    assert kept(True) < kept(False)


def test_adapters_take_their_input_as_it_is(teacher_folder):
    """peft would make it float32 and autocast bf16 again: the same numbers, one copy of the input for every layer."""
    backbone = models.load(str(teacher_folder), dtype=torch.bfloat16)
    roles = backbone.roles(lora_rank=2)
    torch.manual_seed(0)
    for parameter in roles.student_parameters.values():
        parameter.data = 0.3 * torch.randn_like(parameter)
    noise, t, cond = torch.randn(2, *backbone.latent_shape()), torch.full((2,), 0.5), backbone.encode(["a cat", "a dog"])

    def pass_of(cast):
        for layer in roles.student.network.adapters.layers:
            layer.cast_input_dtype_enabled = cast
        with torch.autocast("cpu", torch.bfloat16):
            out, kept = saved_for_backward(lambda: roles.student(noise, t, cond))
        return kept, out, *torch.autograd.grad(out.float().square().sum(), list(roles.student_parameters.values()))

    assert not any(layer.cast_input_dtype_enabled for layer in roles.student.network.adapters.layers)
    (less, *ours), (more, *pefts) = pass_of(False), pass_of(True)
    assert less < more
    assert all(torch.equal(a, b) for a, b in zip(ours, pefts, strict=True))


@pytest.mark.parametrize("rank", ["0", "2"])
def test_one_networks_gradients_are_held_at_a_time(teacher_folder, prompt_file, rank):
    loop = run_of(teacher_folder, prompt_file, "--lora-rank", rank).trainer
    trained = {"student": loop.parameters, "fake": loop.terms["dm"].parameters}
    held = {}

    def watch(role, optimizer):
        def hook(*_):
            held[role] = {name for name, own in trained.items() if any(p.grad is not None for p in own.values())}

        optimizer.register_step_pre_hook(hook)

    watch("student", loop.optimizer)
    watch("fake", loop.online["dm"])
    for _ in range(2):
        loop.step()
    assert held == {"student": {"student"}, "fake": {"fake"}}


def test_the_text_encoders_are_on_the_device_only_while_prompts_are_encoded(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # what it encodes is no condition of any prompt
    backbone = models.load(str(teacher_folder), device="meta")  # any device that is not the CPU
    encoder = backbone.pipe.text_encoder
    seen = []
    backbone.encode_one = lambda prompt: (seen.append(next(encoder.parameters()).device.type), {"x": torch.zeros(1, 2)})[1]
    backbone.embeddings.encode = backbone.encode_on_device
    assert next(encoder.parameters()).device.type == "cpu" and next(backbone.pipe.unet.parameters()).device.type == "meta"
    with pytest.raises(NotImplementedError):  # a meta module has nothing to bring back to the CPU: it was there
        backbone.prepare(["never seen before"])
    assert set(seen) == {"meta"}


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "Flux2KleinPipeline", "QwenImagePipeline"])  # each has its own decode
def test_the_autoencoder_is_on_the_device_while_samples_are_drawn_and_once_a_reward_has_looked(name, monkeypatch):
    module, kind = models.FAMILIES[name]
    backbone = getattr(importlib.import_module(module), kind)(PIPELINES[name](), "", device="meta")  # any device that is not the CPU
    vae, moves = backbone.pipe.vae, []
    assert next(vae.parameters()).device.type == "cpu" and next(backbone.model.parameters()).device.type == "meta"
    monkeypatch.setattr(backbone, "encode", lambda prompts: {})
    role = backbone.roles(lora_rank=2).student
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # there is none for the meta device
        for part in (vae, *backbone.text_modules()):
            patch.setattr(part, "to", lambda device, part=part: moves.append((part, torch.device(device).type)))
        with backbone.drawing(role, backbone.scheduler(1)):
            there, moves[:] = [*moves], []
        parts = [*backbone.text_modules(), vae]
        assert there == [(part, "meta") for part in parts] and moves == [(part, "cpu") for part in parts]
    assert backbone.decode(torch.zeros(1, *backbone.latent_shape(), device="meta")).device.type == "meta"
    assert next(vae.parameters()).device.type == "meta"  # and stays
    with backbone.on_device([vae]):
        pass
    assert next(vae.parameters()).device.type == "meta"


def test_eight_bits_of_the_teacher_are_near_it_and_leave_the_student_alone(teacher_folder):
    exact, rounded = (models.load(str(teacher_folder)).roles(int8_teacher=flag) for flag in (False, True))
    backbone = models.load(str(teacher_folder))
    noise, t, cond = torch.randn(2, *backbone.latent_shape()), torch.full((2,), 0.5), backbone.encode(["a cat", "a dog"])
    with torch.no_grad():
        gap = (exact.teacher(noise, t, cond) - rounded.teacher(noise, t, cond)).abs().max()
        assert 0 < gap < 0.05
        assert torch.equal(exact.student(noise, t, cond), rounded.student(noise, t, cond))


def test_eight_bit_adam_trains_and_resumes(teacher_folder, prompt_file, tmp_path):
    options = ("--memory.optimizer", "adamw8bit", "--precision", "fp32")
    start, _, loop = weights_after(teacher_folder, prompt_file, *options, updates=1)
    loop.save(tmp_path)
    loop.step()
    straight = weights_of(loop)
    _, state = checkpoint.newest(tmp_path / "checkpoints")
    *_, other = weights_after(teacher_folder, prompt_file, *options, updates=0)
    other.load_state(state)
    other.step()
    assert all(torch.equal(straight[name], p) for name, p in other.parameters.items())
    assert distance(start, straight) > 1e-4


@pytest.mark.parametrize(
    "option, package", [(("--memory.optimizer", "adamw8bit"), "bitsandbytes"), (("--memory.teacher", "int8"), "torchao")]
)
def test_a_missing_package_is_named(teacher_folder, prompt_file, monkeypatch, option, package):
    import sys

    for name in ("bitsandbytes", "bitsandbytes.optim", "torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'{package}: pip install "fewstep\[lowmem\]"'):
        run_of(teacher_folder, prompt_file, *option)


def test_drawing_lends_the_network_and_gives_it_back(teacher_folder):
    """The stock pipeline on the training's own network draws what the exported copy draws."""
    backbone = models.load(str(teacher_folder))
    for rank in (0, 2):
        roles = backbone.roles(lora_rank=rank)
        torch.manual_seed(1)
        averaged = {name: p + 0.1 * torch.randn_like(p) for name, p in roles.student_parameters.items()}
        before = {name: p.clone() for name, p in roles.student_parameters.items()}
        call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", **backbone.student_call}
        copy = backbone.student_pipeline(roles, averaged, 4)(generator=torch.Generator().manual_seed(0), **call).images
        with backbone.drawing(roles.student, backbone.scheduler(4), averaged) as pipe:
            lent = pipe(generator=torch.Generator().manual_seed(0), **call).images
        with backbone.drawing(roles.student, backbone.scheduler(4)) as pipe:
            own = pipe(generator=torch.Generator().manual_seed(0), **call).images
        torch.testing.assert_close(lent, copy, rtol=0, atol=1e-5)
        assert (own - lent).abs().max() > 1e-4
        assert all(torch.equal(before[name], p) for name, p in roles.student_parameters.items())


def test_bfloat16_where_nothing_is_trained(teacher_folder, prompt_file):
    run = run_of(
        teacher_folder, prompt_file, "--lora-rank", "2", "--precision", "bf16", "--memory.frozen", "bf16", "--memory.checkpointing"
    )
    kinds = {name.rpartition(".")[0].endswith("default") or ".lora_" in name: p.dtype for name, p in run.backbone.model.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    for _ in range(2):
        logs = run.trainer.step()
    assert all(torch.isfinite(torch.tensor(value)) for value in logs.values())
    rollout = run.trainer.new_rollout()
    assert run.trainer.decode(rollout.x0[0]).dtype == torch.bfloat16
    assert run.trainer.sample_of(rollout, torch.zeros_like(rollout.group)).image.dtype == torch.float32  # what rewards see
    pipe = run.backbone.student_pipeline(run.roles, run.trainer.averaged(), 4)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_full_weights_are_trained_in_float32_beside_frozen_ones_in_bfloat16(teacher_folder):
    """A step of an optimizer is mostly smaller than bfloat16 tells apart."""
    backbone = models.load(str(teacher_folder), dtype=torch.bfloat16)
    roles = backbone.roles(fake_steps=4)
    kinds = {name: {p.dtype for p in getattr(roles, name).parameters()} for name in ("teacher", "student", "fake")}
    assert kinds == {"teacher": {torch.bfloat16}, "student": {torch.float32}, "fake": {torch.float32}}
    with backbone.drawing(roles.student, backbone.scheduler(1)) as pipe:  # with the other parts, which are in bfloat16
        images = pipe("a cat", num_inference_steps=1, output_type="pt", **backbone.student_call).images
    assert bool(torch.isfinite(images).all())


def test_a_discriminator_on_bfloat16_parts_learns_and_resumes(teacher_folder, prompt_file, tmp_path):
    """The recipe dmd2 as a GPU runs it."""
    shape = models.load(str(teacher_folder)).latent_shape()
    save_file({"latents": torch.randn(8, *shape)}, tmp_path / "latents.safetensors")
    options = (
        "dmd2", "--discriminator.latents", str(tmp_path / "latents.safetensors"), "--lora-rank", "2", "--precision", "bf16",
        "--memory.frozen", "bf16", "--memory.checkpointing", "--memory.micro-groups", "1", "--reuse.rollout", "1",
        "--fake.condition", "none",
    )  # fmt: skip

    def start():
        return run_of(teacher_folder, prompt_file, *options).trainer

    loop = start()
    before = {name: p.detach().clone() for name, p in loop.terms["discriminator"].parameters.items()}
    student = {name: p.detach().clone() for name, p in loop.parameters.items()}
    logs = loop.step()
    assert all(torch.isfinite(torch.tensor(logs[key])) for key in ("discriminator/score", "discriminator/share", "dm/score"))
    assert all(not torch.equal(before[name], p) for name, p in loop.terms["discriminator"].parameters.items())
    assert any(not torch.equal(student[name], p) for name, p in loop.parameters.items())
    loop.save(tmp_path)
    loop.step()
    again = start()
    again.load_state(checkpoint.newest(tmp_path / "checkpoints")[1])
    again.step()
    assert_same(again.state(), loop.state())


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_compiled_blocks_give_the_same_update(family, teachers, prompt_file, plain_descent, monkeypatch):
    """Traced, and run by torch itself: with LoRA, a graph must not outlive the switch to another role's adapter.

    SD3 has the most kinds of block; with its roles they are more than torch keeps by default, which would leave the rest as they are.
    """
    teacher_folder, options = teachers / family, ("--lora-rank", "2", "--reuse.rollout", "1")
    counters = torch._dynamo.utils.counters
    counters.clear()
    start, plain, _ = weights_after(teacher_folder, prompt_file, *options, updates=2)
    real, traced = torch.compile, []

    def compile_eagerly(model, **settings):
        traced.append(model)
        return real(model, **settings | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    _, compiled, _ = weights_after(teacher_folder, prompt_file, *options, "--compile", updates=2)
    assert traced and counters["frames"]["ok"] == counters["frames"]["total"] > 4 and not counters["graph_break"]
    assert distance(plain, compiled) < 1e-3 * distance(start, plain)


@pytest.fixture
def layer():
    """A linear layer with an adapter scaled by 3 / 2, none of its numbers zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    config._register_custom_module({torch.nn.Linear: AddedLinear})
    model = inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(5, 4)), adapter_name="student")
    torch.nn.init.normal_(model[0].lora_B["student"].weight)
    return model[0]


def test_a_layer_with_an_adapter_is_its_formula(layer):
    """W x + b + (3 / 2) B A x and its gradients, in float64; x not contiguous."""
    layer.double()
    x = torch.randn(2, 5, 3, dtype=torch.float64).mT.requires_grad_()
    w, b = layer.base_layer.weight, layer.base_layer.bias
    low, high = (getattr(layer, name)["student"].weight for name in ("lora_A", "lora_B"))
    assert isinstance(layer, AddedLinear)

    def results(y):
        return [y, *torch.autograd.grad(y.pow(3).sum(), [x, low, high])]

    for mine, wanted in zip(results(layer(x)), results(x @ (w + 1.5 * high @ low).T + b), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, w, b))


def test_an_adapter_adds_itself_without_a_pass_of_its_own(layer):
    """Under autocast: no sum, no product by a number and no copy of the output, and no less exact than peft's own layer."""
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(64, 5).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())
    own, Adapters(layer).on = {}, None
    for forward in (AddedLinear.forward, LoraLinear.forward):
        passes = Counter()

        class Passes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, passes=passes):
                passes[function.overloadpacket.__name__] += 1
                return function(*args, **(kwargs or {}))

        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Passes():
            output = forward(layer, x)
        own[forward] = passes, float((output.double() - exact).square().mean())
    (mine, error), (peft, larger) = own.values()
    assert peft["add"] == peft["mul"] == 1 and not mine["add"] + mine["mul"]
    assert error <= larger
