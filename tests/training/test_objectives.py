"""Objectives against hand-made models: the denoising loss, terms that share a pass, draws, state, needs."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from lorakit.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule
from lorakit.ground.config import load_config
from lorakit.ground.errors import UserError
from lorakit.training import objective_config
from lorakit.training.batch import Batch
from lorakit.training.config import TrainConfig
from lorakit.training.denoise import Denoise, min_snr_weight
from lorakit.training.objective_config import KINDS, Kind, kinds_of, names_of, prompts_of
from lorakit.training.objectives import Models, Objective, Pass, Term, as_function, make_objective


def make_batch(seed: int = 0, count: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=rng)
    timesteps = torch.tensor([10, 500, 990, 700, 20, 300])[:count]
    keys = tuple((7, position) for position in range(count))
    return Batch(latents, noise, timesteps, torch.zeros(count, 5, 16), None, keys)


def answering(answer):
    return lambda x_t, timesteps, prompt_embeds: answer


def models_of(student, schedule=None, teacher=None) -> Models:
    schedule = schedule or NoiseSchedule.from_scheduler(DDIMScheduler())
    return Models(
        student, teacher or answering(None), lambda prompts: torch.zeros(len(prompts), 5, 16), schedule
    )


def denoise(student, batch, schedule=None, snr_gamma=None):
    """The loss of each sample."""
    models = models_of(student, schedule)
    term = Denoise(SimpleNamespace(snr_gamma=snr_gamma))
    return term.loss(models, Pass(models, batch, batch.prompt_embeds))[0]


# ---- denoise ----


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_its_square(prediction_type):
    schedule, batch = NoiseSchedule.from_scheduler(DDIMScheduler(), prediction_type), make_batch()
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    assert denoise(answering(target), batch, schedule).abs().max() == 0
    loss = denoise(answering(target + 0.5), batch, schedule)
    torch.testing.assert_close(loss, torch.full((3,), 0.25), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_those_of_the_loss_on_x0(prediction_type):
    """weight x (loss in the model's parameterisation) = min(SNR, gamma) x (loss on x_0), for any error."""
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(), prediction_type)
    batch, gamma = make_batch(), 5.0
    timesteps = batch.timesteps
    x_t = schedule.add_noise(batch.latents, batch.noise, timesteps)
    a = schedule.alpha_bar[timesteps].view(-1, 1, 1, 1)
    error = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * 0.1
    target = schedule.target(batch.latents, batch.noise, timesteps)
    prediction = (target + error).double()
    x0 = {
        "epsilon": (x_t.double() - (1 - a).sqrt() * prediction) / a.sqrt(),
        "v_prediction": a.sqrt() * x_t.double() - (1 - a).sqrt() * prediction,
        "sample": prediction,
    }[prediction_type]
    loss_on_x0 = ((x0 - batch.latents.double()) ** 2).mean(dim=(1, 2, 3))
    weighted = denoise(answering(target + error), batch, schedule, snr_gamma=gamma)
    expected = schedule.snr(timesteps).clamp(max=gamma) * loss_on_x0
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-3, atol=1e-6)


def test_min_snr_leaves_low_snr_alone_and_cuts_high_snr():
    weights = min_snr_weight(torch.tensor([0.01, 1.0, 50.0]), 5.0, "epsilon")
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.1]))


def test_the_student_sees_the_noised_latents_and_the_prompt():
    seen = {}

    def spy(x_t, timesteps, encoder_hidden_states, return_dict):
        seen.update(x_t=x_t, timesteps=timesteps, embeds=encoder_hidden_states)
        return (torch.zeros_like(x_t),)

    schedule, batch = NoiseSchedule.from_scheduler(DDIMScheduler()), make_batch()
    denoise(as_function(spy), batch, schedule)
    torch.testing.assert_close(seen["x_t"], schedule.add_noise(batch.latents, batch.noise, batch.timesteps))
    assert torch.equal(seen["timesteps"], batch.timesteps)
    assert seen["embeds"] is batch.prompt_embeds


# ---- terms together ----


class Twice(Denoise):
    def loss(self, models, at):
        loss, parts = super().loss(models, at)
        return 2 * loss, parts


class Away(Term):
    """The distance to the teacher, with a part to log; it does not judge."""

    weight = 0.5

    def __init__(self, cfg=None):
        self.mean, self.steps = 0.0, 0

    def loss(self, models, at):
        teacher = models.teacher(at.x_t, at.timesteps, at.prompt_embeds)
        loss = ((at.prediction - teacher) ** 2).mean(dim=(1, 2, 3))
        return loss, {"distance": loss}

    def validation(self, models, at):
        return None

    def finish_step(self, means):
        self.mean, self.steps = means["distance"], self.steps + 1

    def state_dict(self):
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state):
        self.mean, self.steps = state["mean"], state["steps"]


PLAIN = SimpleNamespace(snr_gamma=None)


def test_terms_share_one_pass_and_their_weighted_sum_is_the_loss():
    calls, batch = [], make_batch()

    def student(x_t, timesteps, prompt_embeds):
        calls.append(1)
        return torch.full_like(x_t, 0.5)

    models = models_of(student, teacher=lambda x_t, *_: torch.zeros_like(x_t))
    both = Objective({"denoise": Denoise(PLAIN), "away": Away()})
    loss, parts = both.loss(models, batch, batch.prompt_embeds)
    assert len(calls) == 1
    alone, nothing = Objective({"denoise": Denoise(PLAIN)}).loss(models, batch, batch.prompt_embeds)
    assert nothing == {} and set(parts) == {"denoise", "away", "away.distance"}
    torch.testing.assert_close(loss, alone + 0.5 * 0.25)
    torch.testing.assert_close(parts["denoise"], alone)
    torch.testing.assert_close(parts["away"], torch.tensor(0.25))


def test_twice_the_loss_is_twice_the_loss():
    batch, models = make_batch(), models_of(lambda x_t, *_: torch.zeros_like(x_t))
    once, twice = (
        Objective({"x": term(PLAIN)}).loss(models, batch, batch.prompt_embeds)[0] for term in (Denoise, Twice)
    )
    torch.testing.assert_close(twice, 2 * once)


def test_only_terms_that_judge_count_in_the_validation():
    batch = make_batch()
    models = models_of(lambda x_t, *_: torch.zeros_like(x_t), teacher=lambda x_t, *_: torch.ones_like(x_t))
    plain = Objective({"denoise": Denoise(PLAIN)}).validation(models, batch, batch.prompt_embeds)
    both = Objective({"denoise": Denoise(PLAIN), "away": Away()})
    assert both.validation(models, batch, batch.prompt_embeds) == plain
    assert both.loss(models, batch, batch.prompt_embeds)[0] != plain


def test_state_moves_once_a_step_by_the_means_of_its_own_parts_and_comes_back():
    objective = Objective({"denoise": Denoise(PLAIN), "away": Away()})
    assert objective.has_state and not Objective({"denoise": Denoise(PLAIN)}).has_state
    objective.finish_step({"denoise": 9.0, "away": 8.0, "away.distance": 3.0})
    assert objective.state_dict() == {"away": {"mean": 3.0, "steps": 1}}
    again = Objective({"denoise": Denoise(PLAIN), "away": Away()})
    again.load_state_dict(objective.state_dict())
    assert again.state_dict() == objective.state_dict()
    with pytest.raises(KeyError):  # a checkpoint that lacks the state is another run
        again.load_state_dict({})


def test_draws_follow_the_sample_and_not_the_batch():
    whole = make_batch(count=6)
    halves = [
        Batch(whole.latents[s], whole.noise[s], whole.timesteps[s], None, None, whole.keys[s])
        for s in (slice(0, 2), slice(2, 6))
    ]
    draws = [torch.cat([half.normal("direction") for half in halves]), whole.normal("direction")]
    assert torch.equal(*draws) and draws[0].shape == whole.latents.shape
    assert sum((half.uniform("guidance") for half in halves), []) == whole.uniform("guidance")
    assert sum((half.integers("node", 50) for half in halves), []) == whole.integers("node", 50)
    assert not torch.equal(whole.normal("direction"), whole.normal("another stream"))
    assert len(set(whole.uniform("guidance"))) == 6 and whole.normal("x", (2,)).shape == (6, 2)


# ---- a gradient by the noise ----


class Steep(Term):
    """The squared gradient of the output by the noise, as Smooth Diffusion has it in spirit."""

    def __init__(self, cfg=None):
        pass

    def loss(self, models, at):
        (gradient,) = torch.autograd.grad(at.prediction.sum(), at.noise, create_graph=True)
        return (gradient**2).mean(dim=(1, 2, 3)), {}


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_t, timesteps, encoder_hidden_states, return_dict):
        rows = self.scale * x_t.flatten(2)[:, None]  # (B, 1, C, h w)
        return (nn.functional.scaled_dot_product_attention(rows, rows, rows)[:, 0].reshape(x_t.shape),)


@pytest.mark.parametrize("math_kernel", [True, False])
def test_a_term_differentiates_by_the_noise_through_attention(math_kernel):
    """Fused attention has no second derivative: without the objective's context backward fails."""
    batch, unet = make_batch(), Attending()
    objective = Objective({"steep": Steep()}, noise_gradient=True)
    context = objective.attention() if math_kernel else Objective({}).attention()
    with context:
        loss, _ = objective.loss(models_of(as_function(unet)), batch, batch.prompt_embeds)
        if math_kernel:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="not implemented"):
                loss.backward()
    assert not batch.noise.requires_grad
    assert (unet.scale.grad is not None) == math_kernel


# ---- the torch-free half ----


def config_of(tmp_path, **settings):
    words = [f"{key}={value}" for key, value in settings.items()]
    return load_config(TrainConfig, None, ["data_dir=x", "n_epochs=1", *words]).config


# What an objective that does not go by itself is made with.
BESIDE: dict[str, dict[str, str]] = {
    "prior": {"objective": '["denoise","prior"]', "prior.prompts": '["a lake"]'},
    "textual_inversion": {"textual_inversion.words": '{"<alps>": "hill"}'},
    "motion": {
        "motion.motion_adapter": "x",
        "motion.camera.zoom": "1.3",
        "target_modules": "temporal",
        "save_format": "diffusers",
    },
}


def test_every_objective_that_the_config_offers_is_made(tmp_path):
    for name in KINDS:
        cfg = config_of(tmp_path, **({"objective": name} | BESIDE.get(name, {})))
        names = names_of(cfg.objective)
        assert (
            name in names and list(make_objective(cfg).terms) == [*names] and len(kinds_of(cfg)) == len(names)
        )
    assert names_of("denoise") == names_of(("denoise",)) == ("denoise",)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('"denoize"', "objective: must be"),
        ("[]", "name at least one"),
        ('["denoise","denoise"]', "each once"),
        ('["denoise","lcn"]', "objective"),
    ],
)
def test_an_objective_that_is_none_is_refused(tmp_path, value, told):
    with pytest.raises(UserError, match="objective") as caught:
        config_of(tmp_path, objective=value)
    assert told in str(caught.value)


def planted(**kinds):
    return KINDS | kinds


def checked(monkeypatch, cfg, **kinds):
    monkeypatch.setattr(objective_config, "KINDS", planted(**kinds))
    objective_config.check_objectives(cfg)


ALLOWED = {
    "torch_compile": False,
    "enable_xformers_memory_efficient_attention": False,
    "mixed_precision": "auto",
}


class SettingsOf:
    """A config with a group of settings for an objective that may not be chosen."""

    model_fields = {"objective": None, "steep": None}

    def __init__(self, **values):
        vars(self).update(ALLOWED | {"steep": None} | values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"objective": ("denoise", "lonely")}, 'objective: "lonely" draws its own noisy latents'),
        ({"objective": "steep", "torch_compile": True}, 'objective, torch_compile: "steep"'),
        ({"objective": ("denoise", "steep"), "mixed_precision": "fp16"}, "objective, mixed_precision"),
        (
            {"objective": "steep", "enable_xformers_memory_efficient_attention": True},
            "objective, enable_xformers",
        ),
        ({"objective": "denoise", "steep": {"weight": 1.0}}, 'steep, objective: settings of "steep"'),
    ],
)
def test_what_cannot_be_trained_together_is_refused_and_names_its_keys(monkeypatch, change, told):
    kinds = {"lonely": Kind("x.X", alone=True), "steep": Kind("x.X", double_backward=True)}
    with pytest.raises(ValueError) as caught:
        checked(monkeypatch, SettingsOf(**change), **kinds)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "good",
    [
        {"objective": "lonely", "torch_compile": True, "mixed_precision": "fp16"},
        {"objective": ("denoise", "steep"), "steep": {"weight": 1.0}, "mixed_precision": "bf16"},
    ],
)
def test_what_can_be_trained_together_is_not_refused(monkeypatch, good):
    kinds = {"lonely": Kind("x.X", alone=True), "steep": Kind("x.X", double_backward=True)}
    checked(monkeypatch, SettingsOf(**good), **kinds)


def test_prompts_of_all_objectives_are_known_before_torch(monkeypatch):
    two = {
        "a": Kind("x.X", prompts=lambda cfg: ("", "a cat")),
        "b": Kind("x.X", prompts=lambda cfg: ("a cat",)),
    }
    monkeypatch.setattr(objective_config, "KINDS", planted(**two))
    assert prompts_of(SimpleNamespace(objective=("denoise", "a", "b"))) == ("", "a cat")
    assert prompts_of(SimpleNamespace(objective="denoise")) == ()
