"""Extension of vLLM's workers: take new weights by vLLM's own reload, and say what was taken.

Imports torch alone at its top: vLLM is there where the methods run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
    _mdpgrpo_done: tuple[str, dict[str, int] | None] = ("", None)  # the last one that ended, and its checksums

    def mdpgrpo_start(self, update: str) -> dict[str, Any]:
        """Begin the update of this name; one that was left open is dropped.

        Returns: held: parameters as name -> dtype, as they are loaded, before vLLM repacks them; packed: the parts of
        fused modules, as qkv_proj -> q_proj, k_proj, v_proj.
        """
        if self._mdpgrpo_update:
            self._mdpgrpo_end_reload()
        model, self._mdpgrpo_done = self.get_model(), ("", None)
        first = {name for name, _ in model.named_parameters()}
        second = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first  # of tied parameters
        self._mdpgrpo_begin_reload()
        self._mdpgrpo_update, self._mdpgrpo_loaded, self._mdpgrpo_sums = update, set(), {}
        loaded = dict(model.named_parameters(remove_duplicate=False))  # the reload takes tied ones apart
        dtypes = {_plain(n): str(p.dtype).removeprefix("torch.") for n, p in loaded.items() if n not in second}
        return {"held": dtypes, "packed": dict(getattr(model, "packed_modules_mapping", {}))}

    def mdpgrpo_load(self, update: str, weights: list[tuple[str, Tensor]] | str) -> list[str]:
        """Load tensors under their checkpoint names; a str is the path of a safetensors file of them.

        Returns [the open update's name], and loads nothing where it is another: this worker was restarted since. A
        file that comes again, as its request was repeated, is passed over. Where loading fails, what went wrong comes
        after the name: an exception would be a server's error, which is asked for again.
        """
        if update != self._mdpgrpo_update or (isinstance(weights, str) and weights in self._mdpgrpo_loaded):
            return [self._mdpgrpo_update]
        try:
            with torch.no_grad(), self._mdpgrpo_summed():
                self.get_model().load_weights(_read(weights) if isinstance(weights, str) else weights)
        except Exception as e:
            return [update, f"{type(e).__name__}: {e}"]
        if isinstance(weights, str):
            self._mdpgrpo_loaded.add(weights)
        return [update]

    def mdpgrpo_finish(self, update: str) -> dict[str, int] | None:
        """End the update. Returns `bit_sum` of every parameter, the same when asked again; None where this update is
        neither the open one nor the last: this worker was restarted since.

        Of one that vLLM repacks or quantises, the sum is that of the loaded values, before it does so.
        """
        if update == self._mdpgrpo_update:
            with torch.no_grad(), self._mdpgrpo_summed():
                self._mdpgrpo_end_reload()
            sums = {_plain(name): loaded for name, (_, _, loaded) in self._mdpgrpo_sums.items()}
            for name, p in self.get_model().named_parameters():
                dtype, elements, _ = self._mdpgrpo_sums.get(name, (p.dtype, p.numel(), 0))
                if (p.dtype, p.numel()) == (dtype, elements):
                    sums[_plain(name)] = bit_sum(p)
            self._mdpgrpo_done = update, sums
        done, found = self._mdpgrpo_done
        return found if update == done else None

    @contextmanager
    def _mdpgrpo_summed(self) -> Iterator[None]:
        """Inside, each layer that vLLM has loaded is summed before vLLM repacks it, in vLLM's own context."""
        names = {module: name for name, module in self.get_model().named_modules()}
        methods = {id(q): q for m in names if (q := getattr(m, "quant_method", None)) is not None}.values()

        def summed(process: Any) -> Any:
            def after_loading(layer: nn.Module) -> None:
                prefix = f"{names[layer]}." if names[layer] else ""
                for name, p in layer.named_parameters(recurse=False):
                    self._mdpgrpo_sums[f"{prefix}{name}"] = (p.dtype, p.numel(), bit_sum(p))
                process(layer)

            return after_loading

        try:
            for method in methods:
                method.process_weights_after_loading = summed(method.process_weights_after_loading)
            with self._mdpgrpo_context():
                yield
        finally:
            for method in methods:
                vars(method).pop("process_weights_after_loading", None)

    def _mdpgrpo_context(self) -> AbstractContextManager[None]:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.vllm_config)  # type: ignore[no-any-return]

    def _mdpgrpo_begin_reload(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._mdpgrpo_context():
            initialize_layerwise_reload(self.get_model())

    def _mdpgrpo_end_reload(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model, self._mdpgrpo_update = self.get_model(), ""
        # It warns of each layer that got no weights: of a tied head, and of rotary embeddings, which have none.
        with self._mdpgrpo_context(), _only_errors(finalize_layerwise_reload.__module__):
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


def _read(path: str) -> list[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    return list(load_file(path).items())


def _plain(name: str) -> str:
    """A parameter's name without what vLLM puts around a layer that may have LoRA adapters."""
    return name.replace(".base_layer.", ".")


EXTENSION = f"{WeightSync.__module__}.{WeightSync.__qualname__}"  # vLLM's worker_extension_cls
