"""Where models come from: a folder or file that is there, or the Hub; and what to do where it gives nothing."""

from __future__ import annotations

from pathlib import Path


def fetch(name: str) -> str:
    """The path of "owner/name:path/in/it" on the Hub, downloaded once, or of a file or folder that is there.

    Raises:
        ValueError: it cannot be had; the message says what to accept where.
    """
    if Path(name).exists():
        return name
    repository, _, inside = name.partition(":")
    if repository.count("/") != 1:
        raise ValueError(f'{name} is not there. Give a path, or "owner/name:path/in/it" of the Hub.')
    patterns = [inside, f"{inside}/*"] if inside else None
    return str(Path(_download(repository, patterns)) / inside)


def fetch_pipeline(name: str) -> str:
    """The folder of a pipeline: a local one, or the parts of it on the Hub that diffusers reads."""
    if Path(name).exists():
        return name
    return _download(name, ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"])


def _download(repository: str, patterns: list[str] | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    address = f"https://huggingface.co/{repository}"
    try:
        return str(snapshot_download(repository, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: accept its terms at {address} with your account, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repository} is not on the Hub ({address}), or private to an account you are not."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{repository} could not be downloaded from {address} ({type(error).__name__}). Check the connection, or fetch it on "
            f"another machine (`hf download {repository} --local-dir FOLDER`) and give the folder."
        ) from error
