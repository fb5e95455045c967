"""What the user names as a model -> a path on this machine: a checkpoint folder, a .gguf file, or a hub repository."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path

from weights.errors import CheckpointError, HubError
from weights.files import check_regular

# The files that are used, and no others: above all no pickles and no code.
_CONFIG_FILES = ("config.json", "generation_config.json")
_HUB_FILES = (
    *_CONFIG_FILES,
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    config_only: bool = False,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The checkpoint folder or .gguf file that `model` stands for.

    A path that exists is taken as it is, without any network. Otherwise `org/name` is a repository id: its
    configuration, tokenizer and safetensors (with `config_only` the configuration alone) are downloaded at `revision`
    (a branch, tag or commit; None: the main branch) to the hub's cache, or found there. `endpoint` and `cache_dir`
    default to the hub library's own.

    Raises CheckpointError when a path does not exist or is neither a folder nor a .gguf file, and HubError, in one
    line, when the repository cannot be had.
    """
    path, mode = _look_up(model)
    if mode is not None and stat.S_ISDIR(mode):
        return path
    if mode is not None:
        check_regular(path, mode)
        if path.suffix != ".gguf":
            raise CheckpointError(f"{model}: a model must be a folder, a .gguf file, or a repository id like org/name")
        return path
    if not _REPO_ID.fullmatch(model) or path.suffix == ".gguf" or path.parent.is_dir():
        raise CheckpointError(f"{model}: no such folder, and not a repository id like org/name")
    return _download(model, revision, _CONFIG_FILES if config_only else _HUB_FILES, endpoint, cache_dir)


def _look_up(model: str) -> tuple[Path, int | None]:
    """The path that `model` would be and its mode in the file system, None when it is not there."""
    try:
        path = Path(model).expanduser()
        return path, path.stat().st_mode
    except (OSError, ValueError, RuntimeError):  # ValueError: a NUL byte; RuntimeError: no such user's home
        return Path(model), None


def _download(
    repo_id: str, revision: str | None, files: Sequence[str], endpoint: str | None, cache_dir: Path | None
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, endpoint=endpoint, cache_dir=cache_dir, allow_patterns=list(files)
        )
    except Exception as error:  # the hub, its HTTP client and the file system each have error types of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise HubError(f"cannot get {repo_id}{at} from the hub: {reason[:400]}") from None
    return Path(folder)
