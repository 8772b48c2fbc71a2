"""The benchmark measures what it says: equal updates of equal networks, every second and byte in its own phase."""

import importlib
import io
import json
import mmap
import sys
from pathlib import Path

import pytest
import torch

from fewstep.trainer import Block
from fewstep.types import Rollout

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

dispatch, evaluate, gpu_kernels, intervals, memory, networks, step = (
    importlib.import_module(name) for name in ("dispatch", "evaluate", "gpu_kernels", "intervals", "memory", "networks", "step")
)

TINY = ["--groups", "2", '--size=["64x64"]', "--device", "cpu", "--precision", "fp32"]
DMD = ["--matching.normalize", "sample", "--matching.levels", "uniform", "--fake.condition", "none"]
UNCLIPPED = ["--student.max-norm", "1e9", "--fake.max-norm", "1e9"]


def test_no_script_has_the_name_of_a_package_that_is_looked_for():
    """Where its folder is on the path, transformers and diffusers would take a script for the package, as they did one called kernels."""
    for utils in ("transformers.utils.import_utils", "diffusers.utils.import_utils"):
        names = dir(importlib.import_module(utils))
        packages = {name[3:-10] for name in names if name.startswith("is_") and name.endswith("_available")}
        assert {"torch", "safetensors"} & packages and not packages & {path.stem for path in (ROOT / "bench").glob("*.py")}


def test_the_networks_have_the_models_own_size():
    sizes = {}
    for name in networks.FAMILIES:
        backbone = networks.backbone(name, reduced=False, device="meta")
        sizes[name] = sum(p.numel() for p in backbone.model.parameters())
        assert backbone.latent_shape() == ({"sdxl": 4}.get(name, 16), 128, 128)  # 1024 x 1024 pixels
    assert sizes == {"sdxl": 2_567_463_684, "sd3.5-medium": 2_243_171_520, "flux.1-dev": 11_901_408_320}


@pytest.fixture
def shallow(monkeypatch):
    """Reduced networks of every kind of layer once, and narrow: a test takes as long as there are layers and columns."""
    narrow = {"num_attention_heads": 1, "attention_head_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    fewer = {
        "sdxl": {
            "block_out_channels": (32, 32, 32), "transformer_layers_per_block": (1, 1, 1), "layers_per_block": 1,
            "attention_head_dim": (1, 1, 1), "cross_attention_dim": 16, "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        },
        "sd3.5-medium": narrow
        | {"num_layers": 2, "dual_attention_layers": (0,), "caption_projection_dim": 16, "pos_embed_max_size": 4, "sample_size": 8},
        "flux.1-dev": narrow | {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6)},
    }  # fmt: skip
    for name, family in networks.FAMILIES.items():
        monkeypatch.setitem(networks.FAMILIES, name, family._replace(reduced=family.reduced | fewer[name]))


@pytest.fixture
def pair(shallow):
    """Both trainers on the same weights, those of student and fake moved away from the teacher's."""

    def made(family, *options):
        torch.manual_seed(0)
        ours = step.Ours(family, [*TINY, *DMD, *UNCLIPPED, *options])
        torch.manual_seed(0)
        plain = step.Plain(family, [*TINY, *DMD, *UNCLIPPED, *options])
        mine, roles = ours.run.roles, plain.reference.roles
        generator = torch.Generator().manual_seed(1)
        for own, other in ((mine.student_parameters, roles.student_parameters), (mine.fake_parameters, roles.fake_parameters)):
            for p, q in zip(own.values(), other.values(), strict=True):
                p.data += 0.05 * torch.randn(p.shape, generator=generator)
                q.data.copy_(p.data)
        return ours, plain

    return made


def gradients_at_step(optimizer, parameters):
    """The list that the optimizer's next step finds its gradients in."""
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in parameters.values()))
    return found


def assert_same_gradients(one, other):
    assert len(one) == len(other) > 0
    difference = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    size = sum(float(a.square().sum()) for a in one)
    # float32, in other kernels on each processor; a prediction from eps at t = 0.9 divides what they round by alpha = 0.12
    assert difference**0.5 < 1e-4 * size**0.5, (difference, size)


@pytest.mark.parametrize(
    "family, options",
    [
        ("sdxl", ("--lora-rank", "2")),
        ("sd3.5-medium", ()),
        ("sd3.5-medium", ("--lora-rank", "2", "--memory.micro-groups", "1", "--memory.checkpointing", "true")),
        ("flux.1-dev", ("--lora-rank", "2")),
    ],
    ids=["sdxl-lora", "sd3-full", "sd3-lora-parts", "flux-lora"],
)
def test_the_reference_makes_the_librarys_updates(pair, monkeypatch, family, options):
    """Given the state, the noise level and the noise, a student update and a fake update are those of fewstep with DMD's own scale."""
    ours, plain = pair(family, *options)
    trainer, reference, matching = ours.trainer, plain.reference, ours.trainer.terms["dm"].reward
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, *trainer.latent_shapes[0], generator=generator)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    k, prompts, group = torch.full((4,), 1), ["a"] * 4, torch.tensor([0, 0, 1, 1])
    cond = trainer.encode(prompts)
    monkeypatch.setattr(reference, "simulate", lambda: (x, 1, cond))
    monkeypatch.setattr(reference, "levels", lambda size: t)
    torch.manual_seed(3)
    noise = torch.randn_like(x)  # what the reference draws under this seed

    theirs = gradients_at_step(reference.student_optimizer, reference.roles.student_parameters)
    torch.manual_seed(3)
    made = reference.student_update()
    mine = gradients_at_step(trainer.optimizer, trainer.parameters)
    rollout = Rollout(x.expand(2, *x.shape), torch.zeros(2, *x.shape), trainer.student.times[:2], cond, group, prompts)
    x0 = trainer.predict(rollout, x, k)
    found = matching.evaluate(x0.whole, cond, group, k=k, t=t, noise=noise)
    trainer.student_update(rollout, Block(k, x, x0.whole, found.direction, None, found.xt, found.t), x0, None)
    assert_same_gradients(mine, theirs)

    for p, q in zip(trainer.parameters.values(), reference.roles.student_parameters.values(), strict=True):
        q.data.copy_(p.data)  # Adam's first step made whole steps of what rounding left of gradients near zero
    torch.testing.assert_close(made[0], x0.whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        fresh = trainer.student.predict(x, k, cond)
    for samples, learnt in ((made, made[0]), (None, fresh)):  # the student update's own, then those of another simulation
        theirs = gradients_at_step(reference.fake_optimizer, reference.roles.fake_parameters)
        torch.manual_seed(3)
        reference.fake_update(samples)
        matching.loss(trainer.sample_of(rollout, k, learnt), t=t, noise=noise).backward()
        own = [*matching_parameters(trainer)]
        assert_same_gradients([p.grad for p in own], theirs)
        for p, q in zip(own, reference.roles.fake_parameters.values(), strict=True):
            p.grad = None
            p.data.copy_(q.data)


def matching_parameters(trainer):
    return trainer.terms["dm"].parameters.values()


def test_the_reference_holds_three_networks_and_ours_one(pair):
    ours, plain = pair("sd3.5-medium", "--lora-rank", "2")
    frozen = {
        name: {id(p) for denoiser in system.denoisers.values() for p in denoiser.parameters() if not p.requires_grad}
        for name, system in (("ours", ours), ("plain", plain))
    }
    assert len(frozen["plain"]) == 3 * len(frozen["ours"])
    trained = [sum(p.numel() for p in own.values()) for own in ours.run.roles[3:]]
    assert trained == [sum(p.numel() for p in own.values()) for own in plain.reference.roles[3:]]


def test_the_references_passes_are_those_of_the_page(shallow):
    """docs/performance.md, the floor: four simulations reach each of the four steps once."""
    plain = step.Plain("sd3.5-medium", [*TINY, *DMD, "--lora-rank", "2"])
    plain.cycle(step.Meter("cpu"))
    size = plain.config.groups * plain.config.group_size
    assert [sum(counts[i] for counts in step.passes(plain.denoisers).values()) / size for i in (0, 1)] == [17, 5]


@pytest.mark.parametrize("family", networks.FAMILIES)
def test_a_gpus_options_train_reduced_networks(shallow, family):
    """What a GPU would be asked for, in its numbers: frozen weights made in bf16, parts of the batch, checkpointing."""
    numbers = ["--groups", "2", '--size=["64x64"]', "--device", "cpu", "--precision", "bf16", "--memory.frozen", "bf16"]
    options = [*step.flags("cuda", family, "lora"), *numbers, "--lora-rank", "2", "--fake.updates", "1", "--steps", "2"]
    for made in (system(family, options) for system in step.SYSTEMS.values()):
        before = {role: [p.detach().clone() for p in denoiser.parameters()] for role, denoiser in made.denoisers.items()}
        made.cycle(step.Meter("cpu"))
        for role, denoiser in made.denoisers.items():
            now = list(denoiser.parameters())
            assert {p.dtype for p in now if not p.requires_grad} == {torch.bfloat16}
            assert all(torch.isfinite(p).all() for p in now)
            changed = [not torch.equal(p, q) for p, q in zip(now, before[role], strict=True)]
            assert any(changed) or role == "teacher"
            assert not any(moved for moved, p in zip(changed, now, strict=True) if not p.requires_grad)


def test_a_phase_owns_its_seconds_and_its_bytes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(step.time, "perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds

    meter = step.Meter("cpu")
    with meter.phase("student"):
        wait(1)
        with meter.phase("fake"):
            wait(10)
            with mmap.mmap(-1, 100_000_000) as fresh:  # 100 MB that no earlier test has left in the heap, gone at once
                for _ in range(100):
                    fresh.write(b"1" * 1_000_000)
        wait(2)
    wait(100)
    assert meter.seconds == {"student": 3, "fake": 10}
    assert meter.peak["fake"] - meter.peak["student"] > 90e6


def test_the_ledger_counts_what_lives_at_once():
    ledger = memory.Ledger()
    weight = torch.zeros(100, device="meta", requires_grad=True)
    ledger.hold(weight, 2)
    with ledger:
        first = weight * 3
        assert ledger.live == {2: 400, 4: 600}  # 100 numbers of two bytes, 100 activations of two or of four
        second = first.view(10, 10) + 1  # a view is no new tensor
        del first
        assert ledger.live == {2: 400, 4: 600} and ledger.peak == {2: 600, 4: 1000}
        assert bool(second.isfinite().all()) and float(second.detach().sum()) == 1
        del second
    assert ledger.live == {2: 200, 4: 200}


def shrink(monkeypatch):
    """sd3.5-medium's real size, of one layer: what is computed on the meta device takes time too."""
    small = {"num_layers": 1, "pos_embed_max_size": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "dual_attention_layers": ()}
    family = networks.FAMILIES["sd3.5-medium"]
    monkeypatch.setitem(networks.FAMILIES, "sd3.5-medium", family._replace(real=family.real | small | {"sample_size": 8}))


def test_the_counted_peak_is_that_of_the_tensors(monkeypatch):
    """Three copies of a network against one, at a size where weights are most of what there is to count."""
    shrink(monkeypatch)
    options = [*memory.options_of("sd3.5-medium", 1), "--groups", "1", "--fake.updates", "1", "--steps", "2"]
    weights = 2 * sum(p.numel() for p in networks.backbone("sd3.5-medium", reduced=False, device="meta").model.parameters())
    ours, plain = (memory.peak_of(name, "sd3.5-medium", options) for name in step.SYSTEMS)
    for width in (2, 4):
        assert abs(plain[width] - ours[width] - 2 * weights) < 0.01 * weights
    assert weights < ours[2] < ours[4] < 1.5 * weights


def test_what_is_launched_is_the_real_networks(monkeypatch):
    """The thin networks are as deep as the real ones, and the passes of an update are those that the trainer makes."""
    for family, thin in dispatch.THIN.items():
        real = networks.backbone(family, reduced=False, device="meta").model
        monkeypatch.setitem(networks.FAMILIES, family, networks.FAMILIES[family]._replace(reduced=thin))
        small = networks.backbone(family, reduced=True, device="meta").model
        assert [(name, type(m)) for name, m in small.named_modules()] == [(name, type(m)) for name, m in real.named_modules()]
        assert sum(p.numel() for p in small.parameters()) < 0.02 * sum(p.numel() for p in real.parameters())
    assert sum(dispatch.PASSES.values()) == 8 + 4.25 and dispatch.PASSES["trained"] == 5  # docs/performance.md, the floor


def test_launching_is_timed_by_kind_of_pass(shallow, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "THIN", {"sd3.5-medium": networks.FAMILIES["sd3.5-medium"].reduced})
    clock = iter(range(1000))
    monkeypatch.setattr(dispatch.time, "process_time", lambda: float(next(clock)))
    assert dispatch.main(["--family", "sd3.5-medium", "--repeat", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| sd3.5-medium | 1000 | 1000 | 1000 | 12.2 |"  # a second by that clock for each


@pytest.fixture
def here(shallow, monkeypatch):
    """Workers in this process."""
    shrink(monkeypatch)
    monkeypatch.setattr(step, "Process", InThisProcess)
    held = {"VmRSS": 0, "VmHWM": 10**6}  # what earlier tests have left in this process's heap would count too
    monkeypatch.setattr(step, "resident", lambda what: held[what])


class InThisProcess:
    """A worker without a process of its own: importing everything again takes longer than what is tested."""

    def __init__(self, task):
        self.answers = step.served(task)
        self.ready = next(self.answers)

    def ask(self, reuse=None):
        return self.answers.send(reuse)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.answers.close()


def test_the_script_measures_both_and_says_their_ratio(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(step.CASES["cpu"], "sd3.5-medium", (["lora"], ["--groups", "2", '--size=["64x64"]']))
    monkeypatch.setattr(step, "EXTRA", [])
    output = tmp_path / "step.json"
    arguments = ["--family", "sd3.5-medium", "--mode", "lora", "--repeat", "1", "--output", str(output)]
    arguments += ["--", "--groups", "1", "--fake.updates", "1"]
    assert step.main(arguments) == 0
    report = json.loads(output.read_text())
    (row,) = report["rows"]
    ours, plain = row["ours"], row["reference"]
    assert row["options"][-4:] == ["--groups", "1", "--fake.updates", "1"]
    # K + 1 + 3 + 1, where the rollout's lag is not measured; 1 + 1
    assert [sum(counts[i] for counts in ours["passes"].values()) for i in (0, 1)] == [9, 2]
    # one of 0, 1, 2, 3 to reach a state; student and fake, guided teacher, and the fake's loss on the student's own predictions
    forwards, backwards = ([counts[i] for counts in plain["passes"].values()] for i in (0, 1))
    assert sum(backwards) == 2 and sum(forwards) in {4 + 1 + n for n in range(4)}
    for key in ("seconds", "processor_seconds", "flops", "real_flops"):
        assert row["ratio"][key] == ours[key] / plain[key] > 0
    assert row["spread"] == {key: [row["ratio"][key]] * 2 for key in ("seconds", "processor_seconds")}  # one turn
    assert ours["seconds"] == pytest.approx(ours["student_seconds"] + ours["fake_seconds"])
    assert row["ratio"]["peak_bytes"] == 1 and set(ours["peak_bytes"].values()) == {10**6}
    assert report["machine"]["torch"] == torch.__version__ and row["peak_flops"] > 0
    unit = step.flops_of_passes("sd3.5-medium", "cpu", "lora")
    for side in (ours, plain):
        one = sum(n * each for role in unit for n, each in zip(side["passes"][role], unit[role], strict=True))
        assert side["flops"] == pytest.approx(2 * one)  # of a group's two samples
        assert side["utilisation"] == pytest.approx(side["flops"] / side["seconds"] / row["peak_flops"])
    assert step.table(report["rows"]) in capsys.readouterr().out


def test_modes_of_the_same_weights_share_a_process(here, monkeypatch):
    """What a GPU measures, on a CPU: the rollout's reuse changes between cycles, and the reference serves every mode."""
    small = ["--groups", "2", '--size=["64x64"]', "--fake.updates", "1"]
    monkeypatch.setitem(step.CASES["cpu"], "sd3.5-medium", (["lora", "lora-u4"], small))
    ours, reference, ready = step.one_after_the_other("cpu", "sd3.5-medium", ["lora", "lora-u4"], 2)
    assert [cycle["updates"] for cycle in ours["lora"]] == [1, 1] and [cycle["updates"] for cycle in ours["lora-u4"]] == [4]
    assert [cycle["updates"] for cycle in reference] == [1, 1] and ready["peak_flops"] > 0
    unit = step.flops_of_passes("sd3.5-medium", "cpu", "lora")
    rows = [step.measure("sd3.5-medium", mode, {"ours": ours[mode], "reference": reference}, ready, small, unit) for mode in ours]
    forwards = [sum(counts[0] for counts in row["ours"]["passes"].values()) for row in rows]
    assert forwards == [9, 5 + 4 / 4]  # the rollout's four are shared by four updates
    assert rows[0]["spread"]["seconds"][0] <= rows[0]["ratio"]["seconds"] <= rows[0]["spread"]["seconds"][1]


def test_a_worker_answers_line_by_line(monkeypatch, capsys):
    def served(task):
        asked = "nothing yet"
        while True:
            asked = yield {"task": task, "asked": asked}

    monkeypatch.setattr(step, "served", served)
    monkeypatch.setattr(sys, "stdin", io.StringIO('null\n"-u4"\n'))
    assert step.main(["--worker", json.dumps({"family": "world"})]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [{"task": {"family": "world"}, "asked": what} for what in ("nothing yet", None, "-u4")]


def test_a_process_that_ends_too_soon_is_an_error_with_its_own_words(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "print('{}', flush=True)\n"
        "assert input() == 'null'\n"
        "print('{\"updates\": 1}', flush=True)\n"
        "assert input() == 'null'\n"
        "raise SystemExit('no such family')\n"
    )
    monkeypatch.setattr(step, "__file__", str(script))
    with step.Process({}) as process:
        assert process.ready == {} and process.ask() == {"updates": 1}
        with pytest.raises(RuntimeError, match=r"exit code 1:\nno such family"):
            process.ask()


KERNELS = {  # as a profile of FLUX.1 and SD3.5 on an H200 names them
    "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN": "matrix products",
    "nvjet_sm90_tst_96x64_64x8_2x1_v_bz_splitK_NTN": "matrix products",
    "void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1": "attention",
    "triton_red_fused__fused_rms_norm__scaled_dot_product_flash_attention__to_copy_add": "fused by the compiler",
    "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>": "copies and casts",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>": "copies and casts",
    "void at::native::elementwise_kernel<128, 2, at::native::MulFunctor<float>>": "element by element",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>": "normalisation",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>": "sums",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolutions",
    "a kernel of tomorrow": "other",
}


@pytest.mark.parametrize("name, kind", KERNELS.items())
def test_a_kernel_is_of_the_kind_that_its_name_says(name, kind):
    assert gpu_kernels.kind_of(name) == kind


def test_kinds_are_summed_and_ordered():
    told = [(name, float(i), 1) for i, name in enumerate(KERNELS)]
    found = gpu_kernels.by_kind(told)
    assert sum(found.values()) == sum(range(len(KERNELS))) and [*found.values()] == sorted(found.values(), reverse=True)


def test_few_blocks_are_as_wide_as_the_real_ones_and_of_every_kind():
    """What a block runs is what is listed, so it must be the block: every shape of the real network's is there, and no other."""
    for family in gpu_kernels.FEW:
        real = networks.backbone(family, reduced=False, device="meta").model
        with gpu_kernels.with_few_blocks(family):
            few = networks.backbone(family, reduced=False, device="meta").model
        assert {tuple(p.shape) for p in few.parameters()} == {tuple(p.shape) for p in real.parameters()}
    assert networks.FAMILIES["flux.1-dev"].real["num_layers"] == 19  # as it was


def test_an_update_is_timed_each_way(shallow, monkeypatch, tmp_path, capsys):
    """Without a GPU: what it has in all, and no kernels."""

    class Here:
        """A pool that is this process: another would import everything again."""

        def __init__(self, workers, mp_context):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, *arguments):
            made = function(*arguments)
            return type("Future", (), {"result": lambda self: made})()

    monkeypatch.setattr(gpu_kernels, "ProcessPoolExecutor", Here)
    monkeypatch.setitem(gpu_kernels.WAYS, "compiled", ["--groups", "1"])  # compiling is tested elsewhere
    output = tmp_path / "kernels.json"
    assert gpu_kernels.main(["--family", "sd3.5-medium", "--way", "eager", "compiled", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    eager, compiled = report["rows"]
    assert (eager["way"], compiled["way"]) == ("eager", "compiled") and eager["seconds"] > 0 and compiled["first_seconds"] > 0
    assert report["machine"]["torch"] == torch.__version__
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| sd3.5-medium | compiled |") and last.endswith("|  |")


def test_evaluation_is_timed_over_every_sample_it_draws(monkeypatch):
    monkeypatch.setattr(evaluate, "FEATURES", 8)
    seen = []
    draw = evaluate.Noise.__call__
    monkeypatch.setattr(evaluate.Noise, "__call__", lambda self, prompt, **told: seen.extend(prompt) or draw(self, prompt, **told))
    found = evaluate.measure(24, 4, batch=5)
    assert found["samples"] * found["pictures"] == len(seen) == 4 * 24  # and none twice
    assert {"fid_teacher", "kid_teacher"} <= set(found["metrics"]) and found["disk_mib"] > 0
    assert found["peak_mib"] >= found["peak_mib_drawing"] >= found["libraries_mib"] > 50
    assert found["pictures_per_second"] == pytest.approx(96 / sum(found["seconds"].values()))


@pytest.mark.parametrize("jackknifed", [False, True])
def test_the_study_of_intervals_sees_those_that_are_too_narrow(monkeypatch, jackknifed):
    found = intervals.coverage(30, 2, 40, jackknifed=jackknifed)
    assert tuple(found) == intervals.NUMBERS
    monkeypatch.setattr("fewstep.evaluate.measure.LEVEL", 0.5)  # within 0.67 standard errors, where 95% are within 1.96
    narrow = intervals.coverage(30, 2, 40, jackknifed=jackknifed)
    assert all(narrow[name]["covered"] < found[name]["covered"] - 0.15 for name in found)
    assert all(0.3 < narrow[name]["width"] / found[name]["width"] < 0.4 for name in found)


def test_the_study_of_intervals_draws_prompts_that_have_something_in_common():
    mine, theirs = (x.view(2000, 2, -1) for x in intervals.sample(2000, 2, torch.Generator().manual_seed(0)))
    for pictures, mean in ((mine, intervals.MOVED), (theirs, 0.0)):
        own = pictures - mean
        assert own.square().mean() == pytest.approx(1.0, abs=0.03) and own.mean() == pytest.approx(0.0, abs=0.03)
        assert (own[:, 0] * own[:, 1]).mean() == pytest.approx(intervals.COMMON, abs=0.03)
    assert ((mine - intervals.MOVED) * theirs).mean() == pytest.approx(intervals.COMMON, abs=0.03)  # of the same prompts
