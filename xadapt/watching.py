"""What layers read and return while a network runs: the hooks, and nothing that is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from xadapt.evaluating import in_eval_mode

Note = Callable[[str, nn.Module, Tensor | None, Tensor | None], None]
"""Is told of each run of a layer: path, layer, the first tensor among its arguments, and its result, or the first of several.
None where that is no tensor."""


@contextmanager
def watching(network: nn.Module, paths: Iterable[str], note: Note) -> Iterator[None]:
    """Tells `note` of each run of these layers until the end of the block. The network is in eval mode meanwhile.

    A network may go on to change these tensors in place: what is kept has to be copied.
    """

    def hook(path: str) -> Any:
        def told(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
            read = next((one for one in (*arguments, *options.values()) if isinstance(one, Tensor)), None)
            first = result[0] if isinstance(result, tuple) and result else result
            note(path, module, read, first if isinstance(first, Tensor) else None)

        return network.get_submodule(path).register_forward_hook(told, with_kwargs=True)

    handles: list[Any] = []
    with in_eval_mode(network):
        try:
            handles.extend(hook(path) for path in dict.fromkeys(paths))
            yield
        finally:
            for handle in handles:
                handle.remove()
