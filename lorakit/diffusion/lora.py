"""LoRA adapters in live models: add them, take their tensors out and put them back, load files into them.

A live layer holds lora_A (our `down`) and lora_B (our `up`), and adds (alpha / rank) * lora_B(lora_A(x)) to
its output.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from lorakit.diffusion.targets import resolve_targets
from lorakit.diffusion.text import dropped
from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraFile, LoraPair, base_of, component_of, kohya_name, refuse_vectors
from lorakit.weights.lora_fit import motion_remedy
from lorakit.weights.lora_foreign import some
from lorakit.weights.lora_import import read_any
from lorakit.weights.lora_metadata import Component

# ---- training ----


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "attention",
    use_dora: bool = False,
    use_rslora: bool = False,
    init: Literal["gaussian", "kaiming", "orthogonal"] = "gaussian",
    seed: int = 0,
    adapter_name: str = "default",
) -> list[torch.nn.Parameter]:
    """Freezes `model`, adds an active LoRA, and returns its parameters in the order of the model's layers.

    They are float32 whatever the base's dtype, and a function of `seed`; the global RNG is left as it was.

    Args:
        model: UNet2DConditionModel or CLIPTextModel.
        targets: a preset of TARGET_PRESETS, or ends of module paths.
        use_rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023). The live alpha becomes
            alpha * sqrt(rank), so that the scale is alpha / rank here as in every file.
        init: of lora_A; "gaussian" N(0, 1/rank^2) and "kaiming" (PEFT's default) leave lora_B zero.
            "orthogonal" fills both with a product of zero, for linear layers and even ranks only.
    Raises:
        UserError: no such preset or module; "orthogonal" with a convolution or an odd rank.
    """
    component: Component = "unet" if hasattr(model, "conv_in") else "text_encoder"
    names = resolve_targets(component, list(_layers(model)), targets)
    if init == "orthogonal":
        _refuse_orthogonal(model, names, rank)
    effective = alpha * math.sqrt(rank) if use_rslora else alpha
    config = LoraConfig(
        r=rank,
        lora_alpha=_float32(effective),  # type: ignore[arg-type]  # annotated int, used as a number
        lora_dropout=dropout,
        target_modules=names,
        use_dora=use_dora,
        init_lora_weights=True if init == "kaiming" else init,
    )
    model.requires_grad_(False)
    _inject(model, config, adapter_name, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _refuse_orthogonal(model: Any, names: Sequence[str], rank: int) -> None:
    layers = _layers(model).items()
    convolutions = [name for name, layer in layers if name in names and layer.weight.ndim == 4]
    if convolutions or rank % 2:
        why = f"{convolutions[0]} is a convolution" if convolutions else f"rank is {rank}"
        raise UserError(f'init "orthogonal" needs linear layers and an even rank, but {why}; use "gaussian"')


def extract(model: Any, prefix: Component, adapter_name: str = "default") -> dict[str, LoraPair]:
    """Copies of a live adapter's tensors on the CPU, by kohya name; empty when the model has no such adapter.

    The model may be wrapped by DDP or torch.compile. rsLoRA is folded in: alpha becomes alpha * sqrt(rank).
    """
    modules = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        tensors = {
            slot: tensor.detach().to("cpu", copy=True) for slot, tensor in _slots(layer, adapter_name).items()
        }
        alpha = float(layer.lora_alpha[adapter_name])
        if layer.use_rslora[adapter_name]:
            alpha = _float32(alpha * math.sqrt(layer.r[adapter_name]))
        modules[kohya_name(prefix, name)] = LoraPair(**tensors, alpha=alpha)
    return modules


def insert(
    model: Any, prefix: Component, modules: Mapping[str, LoraPair], adapter_name: str = "default"
) -> None:
    """Copies tensors back into a live adapter, the exact inverse of `extract`, to resume.

    Raises:
        UserError: modules, shapes or alphas are not those of the live adapter.
    """
    layers = {kohya_name(prefix, name): layer for name, layer in adapter_layers(model, adapter_name).items()}
    if different := sorted(layers.keys() ^ modules.keys()):
        raise UserError(f"the saved LoRA adapts other modules than this config does: {some(different, 3)}")
    alphas = {name: pair.alpha for name, pair in extract(model, prefix, adapter_name).items()}
    for name, layer in layers.items():
        live, saved = _slots(layer, adapter_name), modules[name].tensors()
        same = {slot: t.shape for slot, t in live.items()} == {slot: t.shape for slot, t in saved.items()}
        if not same or not math.isclose(alphas[name], modules[name].alpha, rel_tol=1e-6):
            raise UserError(f"{name}: rank, alpha or DoRA of the saved LoRA is not that of this config")
    for name, layer in layers.items():
        _copy(modules[name], layer, adapter_name)


@contextmanager
def lora_disabled(*models: Any) -> Iterator[None]:
    """The models without any LoRA, None among them skipped; afterwards every layer is as it was."""
    layers = [layer for model in models if model is not None for layer in model.modules()]
    before = [(layer, layer.disable_adapters) for layer in layers if isinstance(layer, LoraLayer)]
    # The layer's own switch, enable_adapters(), would also turn requires_grad on and off.
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


@contextmanager
def only_adapters(model: Any, names: Sequence[str]) -> Iterator[None]:
    """The model with these LoRAs alone, without any for none; afterwards every layer is as it was."""
    if not names:
        with lora_disabled(model):
            yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [(layer, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:  # set_adapter() would also turn requires_grad on and off
            layer._active_adapter = [*names]
        yield
    finally:
        for layer, active in before:
            layer._active_adapter = active


# ---- inference ----


def load_lora(
    source: Path | str | LoraFile,
    unet: Any,
    text_encoder: Any = None,
    *,
    adapter_name: str,
    weight: float = 1.0,
    label: str | None = None,
    notes: list[str] | None = None,
) -> int:
    """Loads a LoRA of any layout beside those already active, frozen; returns how many modules it adapts.

    A weight matrix changes by weight * alpha / rank * up @ down, in the dtype of the base's layer. DoRA at
    weight 0 is left inactive: its magnitudes would stay. The models stay as they were unless every module of
    the file has its place. What it does to layers of the text encoder that clip skip dropped is left out.

    Args:
        label: stands for the file in messages (default: its path).
        notes: gets what a user should know of a file that is read here.

    Raises:
        UserError: modules without a place, other shapes, biases or norms, or a text encoder that was not
            given.
    """
    file, told = (source, ()) if isinstance(source, LoraFile) else read_any(source)
    if notes is not None:
        notes += [f"{source}: {note}" for note in told]
    label = label or ("the LoRA" if isinstance(source, LoraFile) else str(source))
    if any("#" in name for name in file.modules):  # read_any has named them
        raise UserError(
            f"{label}: is in cloneofsimo's layout, which numbers its modules instead of naming them; "
            "name them with `mix_lora.py convert`"
        )
    refuse_vectors(file.modules, label)
    plans: list[tuple[Any, dict[str, LoraPair]]] = []
    models: dict[Component, Any] = {"unet": unet, "text_encoder": text_encoder}
    for component, model in models.items():
        modules = {name: pair for name, pair in file.modules.items() if component_of(name) == component}
        if modules and model is None:
            raise UserError(f"{label}: trains the text encoder too; give it, or its part is lost")
        if component == "text_encoder" and modules:
            lost = dropped(unwrap(model))
            modules = {name: pair for name, pair in modules.items() if not name.startswith(lost)}
        if modules:
            model = unwrap(model)
            if adapter_name in getattr(model, "peft_config", {}):
                raise UserError(f"{label}: the name {adapter_name!r} is taken by another LoRA")
            plans.append((model, _match(model, component, modules, label)))
    for model, pairs in plans:
        _add_pairs(model, pairs, adapter_name, weight)
    return sum(len(pairs) for _, pairs in plans)


def _match(model: Any, component: Component, modules: dict[str, LoraPair], label: str) -> dict[str, LoraPair]:
    """Dotted module name -> pair, in the live layer's shape."""
    layers = _layers(model)
    dotted = {kohya_name(component, name): name for name in layers}
    if unmatched := sorted(modules.keys() - dotted.keys()):
        base = base_of(modules)
        made_for = f"; it is made for {base}" if base else ""
        raise UserError(
            f"{label}: {len(unmatched)} of {len(modules)} modules have no place in this {component}, such as "
            f"{some(unmatched, 3)}{made_for}{motion_remedy(unmatched)}"
        )
    if len({pair.magnitude is None for pair in modules.values()}) == 2:
        raise UserError(f"{label}: has DoRA in a part of its modules only, which cannot be loaded")
    result = {}
    for name, pair in modules.items():
        weight = layers[dotted[name]].weight
        down = (pair.rank, *weight.shape[1:])
        up = (weight.shape[0], pair.rank, *(1 for _ in weight.shape[2:]))
        # A 1x1 convolution and a linear layer hold the same numbers: tools write either shape.
        if pair.down.numel() != math.prod(down) or pair.up.numel() != math.prod(up):
            raise UserError(_misfit(label, name, pair, weight, modules))
        result[dotted[name]] = LoraPair(
            pair.down.reshape(down), pair.up.reshape(up), pair.alpha, pair.magnitude
        )
    return result


def _misfit(
    label: str, name: str, pair: LoraPair, weight: torch.Tensor, modules: Mapping[str, LoraPair]
) -> str:
    base = base_of(modules)
    made_for = f"it is made for {base}" if base else "it is made for another base model"
    sides = f"down {[*pair.down.shape]}, up {[*pair.up.shape]}, the weight here is {[*weight.shape]}"
    return f"{label}: {made_for}: {name} does not fit ({sides})"


def _add_pairs(model: Any, pairs: Mapping[str, LoraPair], adapter_name: str, weight: float) -> None:
    ranks = {f"^{name}": pair.rank for name, pair in pairs.items()}
    alphas = {f"^{name}": pair.alpha for name, pair in pairs.items()}
    first = next(iter(pairs.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        rank_pattern={name: rank for name, rank in ranks.items() if rank != first.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != first.alpha},
        target_modules=list(pairs),
        use_dora=first.magnitude is not None,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    active = active_adapters(model)
    _inject(model, config, adapter_name, seed=0)
    layers = adapter_layers(model, adapter_name)
    assert layers.keys() == pairs.keys()
    for name, pair in pairs.items():
        _copy(pair, layers[name], adapter_name)
        layers[name].set_scale(adapter_name, weight)
    is_off = weight == 0 and first.magnitude is not None
    for layer in _layers(model).values():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(active if is_off else [*active, adapter_name])
    train_only(model, trained)


# ---- layers ----


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile, in any nesting."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def _layers(model: Any) -> dict[str, Any]:
    """Dotted name -> linear layer or convolution, whether LoRA wraps it already or not."""
    layers: dict[str, Any] = {}
    wrapped = None
    for name, module in unwrap(model).named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        if isinstance(module, LoraLayer):
            wrapped = name + "."
            layers[name] = module
        elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            layers[name] = module
    return layers


def adapter_layers(model: Any, adapter_name: str) -> dict[str, Any]:
    """Dotted name -> layer, of those that an adapter is in."""
    return {
        name: layer
        for name, layer in _layers(model).items()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
    }


def _slots(layer: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The live parameters, by the names of LoraPair's fields."""
    slots = {"down": layer.lora_A[adapter_name].weight, "up": layer.lora_B[adapter_name].weight}
    if adapter_name in layer.lora_magnitude_vector:
        slots["magnitude"] = layer.lora_magnitude_vector[adapter_name].weight
    return slots


@torch.no_grad()
def _copy(pair: LoraPair, layer: LoraLayer, adapter_name: str) -> None:
    for slot, parameter in _slots(layer, adapter_name).items():
        parameter.copy_(pair.tensors()[slot].reshape(parameter.shape))


def _inject(model: Any, config: LoraConfig, adapter_name: str, seed: int) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        model.add_adapter(config, adapter_name)


def active_adapters(model: Any) -> list[str]:
    """Names of the adapters that take part in the output."""
    layers = (layer for layer in model.modules() if isinstance(layer, LoraLayer))
    return next((list(layer.active_adapters) for layer in layers), [])


def train_only(model: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Turns requires_grad on for these and off for all others."""
    trained = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _float32(number: float) -> float:
    """The nearest float32: a file keeps alpha as one, and live and saved scales must be the same number."""
    return torch.tensor(number, dtype=torch.float32).item()
