"""Models by their name on the Hugging Face hub: `org/name` is fetched once and opened like any folder.

    folder = local("TinyLlama/TinyLlama_v1.1")

Only safetensors, JSON and tokenizer files are fetched: no pickle and no program reaches this machine.
"""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.errors import UserError

WANTED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")
UNWANTED = ("*/*", "consolidated*")
"""Folders of other frameworks, and a second copy of the weights."""


def local(path: Path) -> Path:
    """The folder of a model: `path` itself, or what the hub has under this name where nothing on this machine has.

    Raises:
        UserError: the hub does not know the name, does not give it, has no safetensors of it or cannot be reached.
    """
    name = path.as_posix()
    if path.exists() or path.parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return path
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except errors.GatedRepoError:
        hint = f"accept them at https://huggingface.co/{name}, then `hf auth login`"
        raise UserError(f"{name}: the hub gives it to those who accept its conditions", hint) from None
    except errors.RepositoryNotFoundError:
        hint = "is it spelled like this? A private one needs `hf auth login`"
        raise UserError(f"{name}: no such folder, and no such model on the Hugging Face hub", hint) from None
    except (OSError, ValueError) as error:
        unreached = isinstance(error, FileNotFoundError | ConnectionError)
        reason = "cannot be reached" if unreached else "does not send it"
        hint = "name a folder on this machine"
        raise UserError(f"{name}: no such folder, and the Hugging Face hub {reason}", hint) from error
    _check(name, folder)
    return folder


def _check(name: str, folder: Path) -> None:
    """Weights are there, and every link ends in the cache of this model, where files lie under their hashes."""
    cache = folder.resolve().parents[1]
    for path in folder.rglob("*"):
        if cache not in path.resolve().parents:
            raise UserError(f"{path}: links to {path.resolve()}, outside the model", "remove it and fetch it again")
    if not any(folder.glob("*.safetensors")):
        hint = "https://huggingface.co/spaces/safetensors/convert makes them from a pickle"
        raise UserError(f"{name}: the hub has no safetensors of it, and jaxlm reads nothing else", hint)
