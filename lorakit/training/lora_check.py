"""A saved LoRA against the one in memory: as we read it, and as diffusers does."""

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakit.diffusion.lora import active_adapters, train_only, unwrap
from lorakit.ground.errors import OutputError, UserError
from lorakit.weights.lora_file import LoraPair
from lorakit.weights.lora_reader import read_lora

_RELOADED = "reloaded"


def verify_file(path: Path, live: Mapping[str, LoraPair], dtype: torch.dtype) -> None:
    """Reads a file back and compares names, alphas and tensors with what it should hold in `dtype`.

    Raises:
        OutputError: it cannot be read, or differs.
    """
    try:
        saved = read_lora(path).modules
    except UserError as error:
        raise OutputError(f"the file just written cannot be read back: {error}") from error
    if different := sorted(saved.keys() ^ live.keys()):
        raise OutputError(f"{path}: does not hold the modules that were trained: {', '.join(different[:5])}")
    for name, pair in live.items():
        wanted, found = pair.tensors(), saved[name].tensors()
        same = wanted.keys() == found.keys() and all(
            found[slot].dtype == dtype and torch.equal(found[slot], wanted[slot].to(dtype)) for slot in wanted
        )
        if not same or not math.isclose(saved[name].alpha, pair.alpha, rel_tol=1e-6):
            raise OutputError(f"{path}: {name} is not what was trained; the disk may be faulty")


@torch.no_grad()
def verify_in_diffusers(
    path: Path, unet: Any, text_encoder: Any = None, adapter_name: str = "default"
) -> float:
    """The largest difference that reloading a file with diffusers makes to the models' outputs.

    The file goes through the code of `load_lora_weights` into the same models, as a second adapter that is
    then removed. Compared are the U-Net's output at timestep 500 for fixed random inputs and the text
    encoder's last hidden states; in float32 on the CPU 0.0 is due. Adapters, requires_grad, modes and the
    global RNG stay as they were.

    Raises:
        UserError: the file adapts a text encoder that was not given.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader

    given = {"unet": unet, "text_encoder": text_encoder}
    models = {name: unwrap(model) for name, model in given.items() if model is not None}
    with _quiet_loading(), torch.random.fork_rng(devices=[]), _unchanged(models.values()):
        loaded: Any = Loader.lora_state_dict(str(path), return_lora_metadata=True, use_safetensors=True)
        state, alphas, metadata = loaded
        present = {key.split(".")[0] for key in state}
        if lost := present - models.keys():
            raise UserError(f"{path}: also adapts the {', '.join(sorted(lost))}, which was not given")
        models = {component: model for component, model in models.items() if component in present}
        loaders = {"unet": Loader.load_lora_into_unet, "text_encoder": Loader.load_lora_into_text_encoder}
        try:
            for component, model in models.items():
                loaders[component](state, alphas, model, adapter_name=_RELOADED, metadata=metadata)
                _realign(model)
            live, saved = (_outputs(models, name) for name in (adapter_name, _RELOADED))
        finally:
            for model in models.values():
                _remove(model, adapter_name)
    return max(float((live[component] - saved[component]).abs().max()) for component in models)


def _realign(model: Any) -> None:
    """Tensors mapped from a file lie at odd addresses, where other kernels run and round in another order."""
    for name, parameter in model.named_parameters():
        if f".{_RELOADED}." in name:
            parameter.data = parameter.data.clone()


def _remove(model: Any, adapter_name: str) -> None:
    if _RELOADED in getattr(model, "peft_config", {}):
        model.set_adapter(adapter_name)
        # diffusers' name for it, and transformers'
        delete = getattr(model, "delete_adapters", None) or model.delete_adapter
        delete(_RELOADED)


def _outputs(models: Mapping[str, Any], adapter_name: str) -> dict[str, torch.Tensor]:
    for model in models.values():
        model.eval()
        model.set_adapter(adapter_name)
    return {component: _probe(component, model) for component, model in models.items()}


def _probe(component: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config, device = model.config, model.device
    if component == "text_encoder":
        length = min(77, config.max_position_embeddings)
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)
        return model(ids.to(device)).last_hidden_state
    side = 2 ** len(config.block_out_channels)  # every level can halve it
    frames = min(3, getattr(config, "motion_max_seq_length", 1))
    latents = torch.randn(frames, config.in_channels, side, side, generator=generator)
    states = torch.randn(frames, 8, config.cross_attention_dim, generator=generator)
    if frames > 1:
        latents = latents.transpose(0, 1)[None]  # (1, C, F, h, w)
    return model(latents.to(device, model.dtype), 500, states.to(device, model.dtype)).sample


@contextmanager
def _unchanged(models: Iterable[Any]) -> Iterator[None]:
    """Puts back the active adapters, the modes, and the parameters' values and flags."""
    models = list(models)
    active = [(model, active_adapters(model)) for model in models]
    modes = [(module, module.training) for model in models for module in model.modules()]
    trained = [(model, [p for p in model.parameters() if p.requires_grad]) for model in models]
    # diffusers casts the whole text encoder to its base's dtype, float32 LoRA weights included.
    weights = [(p, p.data) for model in models for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for model, names in active:
            if names:
                model.set_adapter(names)
        for model, parameters in trained:
            train_only(model, parameters)
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silences reports of missing keys, which are the other adapter's (diffusers 0.42, transformers 5.23)."""
    from transformers.utils import logging as transformers_logging

    names = ("diffusers.utils.peft_utils", "transformers.integrations.peft")
    levels = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    had_bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
