"""What to do about the failures that have a known way out."""

from __future__ import annotations

MEMORY = (
    "Out of memory. Give a smaller micro_batch (the batch stays the same, accumulation makes up for it), of an evaluation a "
    "smaller evaluation_batch or image_batch; turn on gradient_checkpointing, a half-precision dtype, an 8-bit optimizer or CPU "
    "offload; or fewer workers on one device."
)
SHORT = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""What CUDA, torch's CPU allocator and the system say."""
GATED = (
    "The model is gated. Open https://huggingface.co/{name} in a browser, accept its conditions, make a token with read "
    "access under https://huggingface.co/settings/tokens, and log in here with `hf auth login`."
)
MISSING = "No such model or data set, or no network. Check the name, or give a local folder in its place."


def advice_for(error: BaseException) -> str:
    """A way out, or nothing."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # typed as any BaseException
    for each in chain:
        kind, text = type(each).__name__, str(each)
        if isinstance(each, MemoryError) or kind == "OutOfMemoryError" or any(sign in text.lower() for sign in SHORT):
            return MEMORY
        if kind == "GatedRepoError" or "gated repo" in text:
            return GATED.format(name=_repository(text))
        if kind in ("RepositoryNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"):
            return MISSING
    return ""


def _repository(text: str) -> str:
    """owner/name out of the address that the hub's message holds."""
    _, found, rest = text.partition("huggingface.co/")
    parts = rest.replace("api/models/", "").split("/") if found else []
    return "/".join(part.split()[0].rstrip(".,") for part in parts[:2]) if len(parts) >= 2 else "<the model's name>"
