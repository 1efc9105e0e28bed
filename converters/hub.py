"""Models of the Hugging Face Hub, through its client's cache.

Only weights, JSON and tokenizer files at the top of the repository are fetched: never
Python files, and pickled weights only where there are no safetensors. Of a repository
of GGUF files, `owner/name:Q4_K_M`, one model is.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from qjax.errors import SpecError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_TEXT = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_SAFE = ["*.safetensors"]
_PICKLED = ["pytorch_model*.bin", "qmodel.pt"]
_NEVER = ["*/*", "*.py", "consolidated*", "adapter*", "training_args*"]


def looks_like_hub_id(name: str) -> bool:
    """Whether a text has the form `name` or `owner/name`."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch a model into the Hub's cache and return its directory there.

    With `HF_HUB_OFFLINE=1`, or without a network, the cache alone is used.

    Args:
      repo: `owner/name`.
      revision: Branch, tag or commit; the default branch when None.

    Returns:
      The snapshot directory of that revision.

    Raises:
      SpecError: No such model or revision, no access, or no network and not cached.
    """
    directory = _snapshot(repo, revision, [*_TEXT, *_SAFE])
    if not any(directory.glob("*.safetensors")):
        directory = _snapshot(repo, revision, [*_TEXT, *_PICKLED])
    return directory


def download_gguf(repo: str, name: str, revision: str | None = None) -> Path:
    """Fetch one GGUF model of a repository.

    Args:
      repo: `owner/name`.
      name: what stands before `.gguf`, such as `Q4_K_M`, in lower or upper case.
      revision: see `download`.

    Returns:
      The file in the Hub's cache, of a split model its first part.

    Raises:
      SpecError: see `download`; or no file, or several, are named so.
    """
    cases = [f"*{case}*.gguf" for case in {name, name.lower(), name.upper()}]
    folders = [f"*/{case}" for case in cases]
    directory = _snapshot(repo, revision, [*cases, *folders], [])
    part = re.compile(rf"(?:.*[-._])?{re.escape(name)}(-\d{{5}}-of-\d{{5}})?", re.I)
    found = {
        path: match
        for path in sorted(directory.rglob("*.gguf"))
        if (match := part.fullmatch(path.stem))
    }
    firsts = [p for p, m in found.items() if not m[1] or m[1].startswith("-00001-")]
    if len(firsts) != 1:
        names = [str(path.relative_to(directory)) for path in firsts]
        raise SpecError(
            f"{repo}:{name}: {names or 'no GGUF file'} named so on the Hub; give the "
            "end of one file's name, without .gguf, behind the colon"
        )
    return firsts[0]


def download_adapter(repo: str, revision: str | None = None) -> Path:
    """Fetch an adapter of PEFT; see `download`."""
    names = ["adapter_config.json", "adapter_model.safetensors"]
    directory = _snapshot(repo, revision, names, ["*/*"])
    if not (directory / names[1]).exists():
        directory = _snapshot(repo, revision, [names[0], "adapter_model.bin"], ["*/*"])
    return directory


def download_config(repo: str, revision: str | None = None) -> Path:
    """Fetch a model's `config.json` alone; see `download`."""
    return _snapshot(repo, revision, ["config.json"], ["*/*"]) / "config.json"


def _snapshot(
    repo: str,
    revision: str | None,
    patterns: list[str],
    never: Sequence[str] = tuple(_NEVER),
) -> Path:
    from huggingface_hub import errors, snapshot_download

    asked = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(never),
            )
        )
    except errors.GatedRepoError as error:
        raise SpecError(
            f"{asked}: access to this model must be requested on its page on the "
            "Hugging Face Hub; then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SpecError(
            f"{asked}: neither a directory here nor a model on the Hugging Face Hub "
            "(if it is private, log in with `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SpecError(f"{asked}: the model has no such revision") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise SpecError(
            f"{asked}: not a directory here, not in the Hub's cache, and the Hub "
            f"cannot be reached: {str(error).splitlines()[0][:200]}"
        ) from error
