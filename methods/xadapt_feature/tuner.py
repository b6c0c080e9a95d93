"""The tuner: PEFT's own, told to adapt an identity linear on one side of each target layer.

`FeatureTuner` stands before a PEFT tuner class in a class of two bases. PEFT's class does what it always does
(match names, build its layer, rank patterns, several adapters); it is handed the identity instead of the base layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from xadapt.fingerprint import layer_print
from xadapt.peft_internals import (
    BaseTuner,
    BaseTunerLayer,
    NoMatchingPeftModuleError,
    QuantizationBackend,
    get_quantization_kwargs,
    include_all_linear,
    onload_layer,
    resolve_quantization_backend,
    warn_of_shards,
)

from .checks import adaptable, check_target, check_tie
from .config import FeatureConfig
from .layer import FeatureLayer
from .shadow import shadow_of
from .spaces import get_space
from .tie import TiedLayer, tie_key


class FeatureTuner(BaseTuner):
    """Mixin, to be put before a PEFT tuner class. `layer_cls` is the FeatureLayer that poses as that class's layer."""

    layer_cls: ClassVar[type[FeatureLayer]]
    tied_cls: ClassVar[type[TiedLayer]]  # is a layer_cls too, or PEFT's loops would pass by the tied layers
    phi_name: ClassVar[str]  # the layers' child that holds the hosted layer

    # ---- before anything is changed

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, after every target has been checked; where it fails all the same, what it did is taken back."""
        config = cast(Any, self.peft_config[adapter_name])
        layers = [module for module in model.modules() if isinstance(module, FeatureLayer)]
        is_new = not any(adapter_name in layer._get_available_adapters() for layer in layers)
        if getattr(config, "tie", None):
            kwargs["state_dict"] = None  # its keys name the leaders only; the config names all of the layers
        targets: dict[str, nn.Module] = {}
        emptied = _unwrap_emptied(model)
        self._leaders: dict[tuple[str | None, ...], FeatureLayer] = {}
        try:
            targets = self._targets(config, model, kwargs.get("state_dict"))
            for path, module in targets.items():
                self._check_target(config, path, module)
            check_tie(config, targets, model)
            _keep_base_out(config, targets)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.is_new:
                config.base_fingerprint = _fingerprint(targets)
        except BaseException as error:
            if is_new:
                self._take_back(model, adapter_name, targets)
            _put(model, emptied)
            if isinstance(error, NoMatchingPeftModuleError):
                raise NoMatchingPeftModuleError(f"{error} {adaptable(config, model)}") from None
            raise
        finally:
            self._leaders = {}

    def _take_back(self, model: nn.Module, adapter_name: str, targets: dict[str, nn.Module]) -> None:
        """Leave no trace of an adapter that could not be injected."""
        for module in targets.values():
            if isinstance(module, FeatureLayer):
                module.delete_adapter(adapter_name)
        _put(model, {path: module for path, module in targets.items() if not isinstance(module, FeatureLayer)})
        for name, shared in self.named_children():  # tensors that layers share (VeRA, VB-LoRA ...)
            if name != "model" and adapter_name in getattr(shared, "keys", tuple)():
                del cast(Any, shared)[adapter_name]
        self.peft_config.pop(adapter_name, None)
        if not self.peft_config and getattr(model, "_hf_peft_config_loaded", False):
            cast(Any, model)._hf_peft_config_loaded = False  # transformers and diffusers set it before they ask PEFT

    def _targets(
        self, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, nn.Module]:
        """The layers that this config, or these tensors, are going to adapt, by path."""
        if getattr(config, "target_modules", None) is None:
            config = self._prepare_adapter_config(config, self.get_model_config(model))
        config = include_all_linear(config, model)
        inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        keyed = {key.rsplit("." + self.prefix, 1)[0] for key in state_dict or ()}
        return {
            path: module
            for path, module in model.named_modules()
            if path
            and not path.startswith(inside)
            and (path in keyed or (not keyed and self._check_target_module_exists(config, path)))
        }

    def _check_target(self, config: Any, path: str, module: nn.Module) -> None:
        """Raise ValueError where this adapter cannot sit on this layer."""
        check_target(config, path, module, self.model, self.layer_cls, self._backend(module))

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        others = {
            name: cast(Any, other) for name, other in self.peft_config.items() if isinstance(other, FeatureConfig)
        }
        for name, other in others.items():
            if other is config:
                continue
            if other.space != config.space:
                raise ValueError(
                    f"Adapter {name!r} acts in {other.space} space, the new one in {config.space} space. Train both in "
                    "one space, or merge the first."
                )

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying=True with the embedding among the target modules: it is tied to {tied_weight_keys}, and "
            "what is an output feature of one is an input feature of the other. Leave the embedding out, or name it in "
            "modules_to_save."
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        if hasattr(prepared, "fan_in_fan_out"):
            prepared.fan_in_fan_out = False  # a property of the base layer; the hosted layer is a plain linear
        return prepared

    # ---- the change

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Tuners that size shared tensors by the model's layers (VeRA, RandLoRA, FRoD ...) are shown the identities."""
        if type(self)._hosted_hook() is BaseTuner._pre_injection_hook:
            return
        with self._showing(shadow_of(model, self._targets(config, model), get_space(config.space))):
            super()._pre_injection_hook(self.model, config, adapter_name)

    @classmethod
    def _hosted_hook(cls) -> Any:
        after = cls.__mro__[cls.__mro__.index(FeatureTuner) + 1 :]
        return next(vars(c)["_pre_injection_hook"] for c in after if "_pre_injection_hook" in vars(c))

    @contextmanager
    def _showing(self, shadow: nn.Module) -> Iterator[None]:
        model = self.model
        try:
            self.model = shadow
            yield
        finally:
            self.model = model

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(
                f"target_parameters={parameter_name!r}: a bare parameter has no input or output features to adapt. "
                "Name the layer that holds it in target_modules."
            )
        layer = target if isinstance(target, FeatureLayer) else self._new_layer(peft_config, target, current_key)
        if not isinstance(layer, TiedLayer):
            self._host(peft_config, adapter_name, layer, current_key)
        if layer is not target:
            setattr(parent, target_name, layer)

    def _new_layer(self, config: Any, target: nn.Module, path: str) -> FeatureLayer:
        arguments = (target, get_space(config.space), self.phi_name, self._backend(target))
        key = tie_key(getattr(config, "tie", None), path)
        if key is None:
            return self.layer_cls(*arguments)
        if key in self._leaders:
            return self.tied_cls(self._leaders[key], *arguments)
        self._leaders[key] = self.layer_cls(*arguments)
        return self._leaders[key]

    def _host(self, config: Any, adapter_name: str, layer: FeatureLayer, path: str) -> None:
        """Let PEFT put its layer on the identity, or add an adapter to the layer that it has put there."""
        with warnings.catch_warnings():
            # PEFT says of the identity that it has no bias to merge into; _check_target says it of the base layer.
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
            self._hosted_create(config, adapter_name, layer.hosted, layer.phi_name, layer, current_key=path)

    @property
    def _hosted_create(self) -> Callable[..., None]:
        """`_create_and_replace` of the PEFT tuner that this mixin stands before."""
        return super()._create_and_replace  # type: ignore[safe-super]  # abstract only in BaseTuner

    def _backend(self, layer: nn.Module) -> QuantizationBackend | None:
        return resolve_quantization_backend(layer, **get_quantization_kwargs(self.model))

    # ---- loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's. A tensor that layers share is stored under one of its names; PEFT would miss it under the others."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
        values = {names[name]: tensor for name, tensor in found.items() if name in names}
        return {**found, **{name: values[tensor] for name, tensor in names.items() if tensor in values}}

    # ---- merge

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's, but all layers or none: a layer that cannot be merged is found before any is changed."""
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's, but all layers or none, as `merge_adapter`."""
        self._check_merge(safe_merge, adapter_names)
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        layers = {path: module for path, module in self.model.named_modules() if isinstance(module, FeatureLayer)}
        # Taken, and kept alive, before onloading puts other tensors in their places.
        weights = {path: layer.get_base_layer()._parameters.get("weight", layer) for path, layer in layers.items()}
        holders: dict[int, str] = {}
        for path, module in layers.items():
            refusal = None
            with onload_layer(module):  # has to end without an error, or the layer stays onloaded
                try:
                    module.check_merge(safe_merge, adapter_names)
                except ValueError as error:
                    refusal = ValueError(f"{path}: {error}")
            if refusal is not None:
                raise refusal
            other = holders.setdefault(id(weights[path]), path)
            if other != path:
                raise ValueError(
                    f"{other} and {path} share one weight (layer_replication, tied weights), which cannot hold both of "
                    "their adapters. Run the model unmerged."
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT does this for its own LoRA. A bias of lora_B has one dimension and is whole.
        warn_of_shards({k: v for k, v in found.items() if not k.endswith(".bias")}, adapter_name)
        return found

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: Any,
        weights: Any,
        new_rank: Any,
        target: nn.Module,
        *args: Any,
        **kw: Any,
    ) -> tuple[Tensor, Tensor]:
        """Of LoRA's `add_weighted_adapter`: the matrices to combine are those of Φ, not those of the base layer."""
        hosted = target.hosted if isinstance(target, FeatureLayer) else target
        combine = super()._svd_generalized_task_arithmetic_weighted_adapter  # type: ignore[misc]  # LoraModel has it
        return cast(
            "tuple[Tensor, Tensor]", combine(combination_type, adapters, weights, new_rank, hosted, *args, **kw)
        )


def _keep_base_out(config: Any, targets: dict[str, nn.Module]) -> None:
    """Have PEFT save an adapted embedding's adapter, and the base's weight beside it only when asked to.

    With save_embedding_layers="auto", its default, PEFT would store the source's weight as well, and loading would
    overwrite a sibling's with it. Where token rows are named, even none, "auto" goes by the size of the vocabulary alone.
    """
    embeddings = ("embed_tokens", "lm_head")  # the names that "auto" looks for
    adapts_one = any(path.rpartition(".")[-1] in embeddings for path in targets)
    if adapts_one and getattr(config, "trainable_token_indices", None) is None:
        config.trainable_token_indices = {}


def _unwrap_emptied(model: nn.Module) -> dict[str, nn.Module]:
    """Take away the layers whose adapters have all been deleted, so that none of them (a tie, a space) is inherited."""
    emptied: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, FeatureLayer) and not module._get_available_adapters() and not module.merged
    }
    _put(model, {path: cast(FeatureLayer, layer).base_layer for path, layer in emptied.items()})
    return emptied


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


@contextmanager
def refuse_mixed_batches(self: BaseTuner, *args: Any, **kwargs: Any) -> Iterator[None]:
    """PEFT's `_enable_peft_forward_hooks` for methods that have none: they would take no notice of `adapter_names`."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names={kwargs['adapter_names']!r}: {type(self).__name__} cannot give each row of a batch an "
            "adapter of its own. Run the rows apart, with set_adapter or disable_adapter between them; adapters of "
            "InputAdaConfig, OutputAdaConfig and HybridAdaConfig can be mixed in a batch."
        )
    yield


def poses_as(layer_cls: type[BaseTunerLayer], name: str, base: type[FeatureLayer] = FeatureLayer) -> type[FeatureLayer]:
    """A subclass of `base` that `isinstance` takes for PEFT's layer class, so that PEFT's loops over layers find it."""
    posing = type(name, (base,), {"__doc__": f"A {base.__name__} that hosts {layer_cls.__name__}."})
    layer_cls.register(posing)
    return cast("type[FeatureLayer]", posing)


def _fingerprint(targets: dict[str, nn.Module]) -> dict[str, str]:
    """What tells this base from its siblings, by layer."""
    prints = {}
    for path, module in targets.items():
        layer = module.get_base_layer() if isinstance(module, FeatureLayer) else module
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            prints[path] = layer_print(weight).as_text()
    return prints
