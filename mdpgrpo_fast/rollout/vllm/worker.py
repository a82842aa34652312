"""Extension of vLLM's workers: take new weights by vLLM's own reload, and say what was taken.

Imports torch alone at its top: vLLM is there where the methods run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checksums import bit_sum


class WeightSync:
    """Mixed into each of vLLM's workers by `worker_extension_cls`; its methods are called through `collective_rpc`.

    An update is `mdpgrpo_start`, any number of `mdpgrpo_load`, `mdpgrpo_finish`: vLLM's layerwise reload, which builds
    each layer as at the first load, takes its weights, and repacks them for its kernels. Arguments and results are
    what JSON can carry, but for tensors handed over inside one process.
    """

    get_model: Any  # of vLLM's worker, as what follows
    vllm_config: Any
    model_runner: Any
    _mdpgrpo_update = ""  # the open one's name
    _mdpgrpo_loaded: set[str]  # files of it
    _mdpgrpo_sums: dict[str, tuple[torch.dtype, int, int]]  # dtype, elements and checksum as a layer was loaded

    def mdpgrpo_start(self, update: str) -> dict[str, Any]:
        """Begin the update of this name; one that was left open is dropped.

        Returns: held: parameters as name -> dtype, as they are loaded, before vLLM repacks them; packed: the parts of
        fused modules, as qkv_proj -> q_proj, k_proj, v_proj.
        """
        if self._mdpgrpo_update:
            self._mdpgrpo_end_reload()
        model = self.get_model()
        held = [name for name, _ in model.named_parameters()]  # once each: the reload takes tied ones apart
        self._mdpgrpo_begin_reload()
        self._mdpgrpo_update, self._mdpgrpo_loaded, self._mdpgrpo_sums = update, set(), {}
        loaded = dict(model.named_parameters(remove_duplicate=False))
        dtypes = {_plain(name): str(loaded[name].dtype).removeprefix("torch.") for name in held}
        return {"held": dtypes, "packed": dict(getattr(model, "packed_modules_mapping", {}))}

    def mdpgrpo_load(self, update: str, weights: list[tuple[str, Tensor]] | str) -> list[str]:
        """Load tensors under their checkpoint names; a str is the path of a safetensors file of them.

        Returns [the open update's name], and loads nothing where it is another: this worker was restarted since. A
        file that comes again, as its request was repeated, is passed over.
        """
        if update == self._mdpgrpo_update and not (isinstance(weights, str) and weights in self._mdpgrpo_loaded):
            if isinstance(weights, str):
                from safetensors.torch import load_file

                self._mdpgrpo_loaded.add(weights)
                weights = list(load_file(weights).items())
            with torch.no_grad(), self._mdpgrpo_summed():
                self.get_model().load_weights(weights)
        return [self._mdpgrpo_update]

    def mdpgrpo_finish(self, update: str) -> dict[str, int] | None:
        """End the update. Returns `bit_sum` of every parameter, None where this update is not the open one.

        Of one that vLLM repacks or quantises, the sum is that of the loaded values, before it does so.
        """
        if update != self._mdpgrpo_update:
            return None
        with torch.no_grad(), self._mdpgrpo_summed():
            self._mdpgrpo_end_reload()
        sums = {}
        for name, p in self.get_model().named_parameters():
            dtype, elements, loaded = self._mdpgrpo_sums.get(name, (p.dtype, p.numel(), None))
            as_loaded = (p.dtype, p.numel()) == (dtype, elements)
            sums[_plain(name)] = bit_sum(p) if loaded is None or as_loaded else loaded
        return sums

    @contextmanager
    def _mdpgrpo_summed(self) -> Iterator[None]:
        """Inside, each layer that vLLM has loaded is summed before vLLM repacks it."""
        names = {module: name for name, module in self.get_model().named_modules()}
        methods = {id(q): q for m in names if (q := getattr(m, "quant_method", None)) is not None}.values()

        def summed(process: Any) -> Any:
            def after_loading(layer: nn.Module) -> None:
                for name, p in layer.named_parameters(recurse=False) if layer in names else ():
                    full = f"{names[layer]}.{name}" if names[layer] else name
                    self._mdpgrpo_sums[full] = (p.dtype, p.numel(), bit_sum(p))
                process(layer)

            return after_loading

        try:
            for method in methods:
                method.process_weights_after_loading = summed(method.process_weights_after_loading)
            yield
        finally:
            for method in methods:
                vars(method).pop("process_weights_after_loading", None)

    def _mdpgrpo_begin_reload(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.get_model())

    def _mdpgrpo_end_reload(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model, self._mdpgrpo_update = self.get_model(), ""
        # It warns of each layer that got no weights: of a tied head, and of rotary embeddings, which have none.
        with set_current_vllm_config(self.vllm_config), _only_errors(finalize_layerwise_reload.__module__):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            if self.vllm_config.device_config.device_type == "cpu":
                repack_tied_heads(model)
        self.model_runner.reset_lora_state()


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Inside, the logger of this name says nothing below an error."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def repack_tied_heads(model: nn.Module) -> None:
    """Layers that share a parameter with one before them are packed again for vLLM's CPU kernels.

    vLLM's reload repacks one of the layers that share a parameter: a head tied to the embeddings would go on with the
    packed copy of its old weights (vLLM 0.32 and 0.33, the second limitation named in its reload package).
    """
    owners: set[int] = set()
    for layer in model.modules():
        own = {id(p) for p in layer.parameters(recurse=False)}
        if own & owners and (method := getattr(layer, "quant_method", None)) is not None:
            method.process_weights_after_loading(layer)
        owners |= own


def _plain(name: str) -> str:
    """A parameter's name without what vLLM puts around a layer that may have LoRA adapters."""
    return name.replace(".base_layer.", ".")


EXTENSION = f"{WeightSync.__module__}.{WeightSync.__qualname__}"  # vLLM's worker_extension_cls
