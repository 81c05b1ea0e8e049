"""Models by their id on the Hugging Face hub: `org/name` or `org/name@revision`, downloaded by huggingface_hub into its cache.

The client's own settings hold: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN. Only weights in safetensors, settings, tokenizers
and chat templates at the top of the repository are fetched; never pickled weights, never code. A branch or tag is resolved to
the commit it names, so that a manifest can pin what was used. A cut connection is resumed by the client where it broke off; after
a failed run, finished files are not fetched again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError, MissingError, R1qError
from r1q.core.files import explain_os_error

_ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md"]
_IGNORED = ["*/*", "consolidated*"]  # other formats' folders; Mistral's second copy of the weights
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model folder on this machine. `repository` and `commit` say where it came from; None for a folder of the user's own."""

    path: Path
    repository: str | None = None
    commit: str | None = None


def find_model(
    text: str, *, cache: Path | None = None, endpoint: str | None = None, progress: bool = False
) -> FoundModel:
    """Return the model that `text` names: a folder if there is one, else a hub id, which is downloaded.

    `cache` and `endpoint` default to the client's settings; `progress` lets the client draw its bars on stderr. Raises
    `InputError` for an id that is malformed, unknown, gated or without safetensors, `MissingError` without a connection (or in
    offline mode) when the cache does not have it, `ResourceError` for a full disk.
    """
    path = Path(text).expanduser()
    if path.exists():
        return FoundModel(path=path)
    match = _ID.fullmatch(text)
    if match is None:
        raise InputError(f"{text} is neither a folder nor a hub id; give a folder, or org/name, or org/name@revision")
    return _download(match["repository"], match["revision"], cache, endpoint, progress)


def _download(
    repository: str, revision: str | None, cache: Path | None, endpoint: str | None, progress: bool
) -> FoundModel:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache,
            endpoint=endpoint,
            allow_patterns=_ALLOWED,
            ignore_patterns=_IGNORED,
            tqdm_class=None if progress else _silent_bar(),
        )
    except errors.HFValidationError as error:
        raise InputError(f"{repository} is not a hub id: {_one_line(error)}") from error
    except (OSError, _transport_error()) as error:
        raise _explained(error, f"{repository}@{revision}" if revision else repository, cache) from error
    path = Path(folder)
    if not _COMMIT.fullmatch(path.name):
        raise InputError(f"{repository}: the hub gave {path.name!r} for a commit; check HF_ENDPOINT")
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{repository} has no *.safetensors files at its top level; pickled weights are never loaded: take a converted "
            "repository, or convert it with transformers where you trust it"
        )
    return FoundModel(path=path, repository=repository, commit=path.name)


def _transport_error() -> type[Exception]:
    """Return the base of the errors of the HTTP library that the client is built on (httpx, or what it moved to)."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(
        base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception) and not issubclass(base, OSError)
    )


def _explained(error: Exception, model: str, cache: Path | None) -> R1qError:
    """Return the error a user should see. The order matters: a gated repository also counts as one that was not found."""
    from huggingface_hub import constants, errors

    kinds: tuple[tuple[type[Exception], R1qError], ...] = (
        (
            errors.GatedRepoError,
            InputError(f"{model} is gated: accept its licence on its page, then log in (hf auth login, or HF_TOKEN)"),
        ),
        (
            errors.RevisionNotFoundError,
            InputError(f"{model}: the hub knows no such revision; give a branch, a tag or a commit"),
        ),
        (
            errors.RepositoryNotFoundError,
            InputError(f"{model} is not on the hub, or is private; check the name, or log in (hf auth login)"),
        ),
        (errors.LocalEntryNotFoundError, _unreachable(model, constants.HF_HUB_OFFLINE, error)),
        (errors.HfHubHTTPError, MissingError(f"the hub failed on {model}: {_one_line(error)}; try again later")),
    )
    for kind, explained in kinds:
        if isinstance(error, kind):
            return explained
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(error, cache or Path(constants.HF_HUB_CACHE))
    return MissingError(
        f"{model}: the download broke off ({_one_line(error)}); run the same command again, finished files are kept"
    )


def _unreachable(model: str, offline: bool, error: Exception) -> R1qError:
    if offline:
        return MissingError(f"{model} is not whole in the cache and HF_HUB_OFFLINE is set; unset it, or give a folder")
    cause = _one_line(error.__cause__ or error)
    return MissingError(
        f"{model} is not whole in the cache and the hub cannot be reached ({cause}); check the connection, or give a folder"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _silent_bar() -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class SilentBar(tqdm):
        """A progress bar that draws nothing: a library does not write to stderr."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return SilentBar
