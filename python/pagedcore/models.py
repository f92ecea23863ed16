"""Loading a Hugging Face causal language model, and finding out whether its attention can run over pages.

What a model needs from the KV cache is not read off its configuration, whose names differ from family to family: two
tokens are run through it with a probe in place of the attention, and what the layers ask for is written down
(`attention.LayerShape`). A model that keeps other state than keys and values, or whose attention goes past the
interface, shows in that run and is refused.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pagedcore import attention, environment, linear
from pagedcore.devices import DTYPES, choose_device, choose_dtype
from pagedcore.errors import InvalidArgumentError, UnsupportedError
from pagedcore.layout import MAX_HEAD_DIM
from pagedcore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

#: Kinds of layer whose keys and values are paged as they are. Others (linear attention, chunks) keep other state.
_PAGED_LAYERS = {"full_attention", "sliding_attention"}

#: Rotary embeddings whose frequencies depend on the longest sequence of the batch, once that passes the original
#: length.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

#: Packed copies of the weights are made if they take at most this share of the memory that is available.
_PACK_MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the runner, with what the layers above it need to know."""

    module: PreTrainedModel
    tokenizer: Tokenizer | None  # None: the model takes and gives token ids only
    name: str
    layers: tuple[attention.LayerShape, ...]
    vocab_size: int  # token ids are in [0, vocab_size)
    max_model_len: int  # positions the model has, in tokens
    stop_token_ids: tuple[int, ...]  # end the answer unless a request says otherwise
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Source:
    """Where a model is read from: the directory or hub name, and the GGUF file in it, if it is one."""

    location: str
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for from_pretrained. Left unsaid, it would ask on stdin whether to run a repository's code."""
        options: dict[str, Any] = {"trust_remote_code": False}
        return options | {"gguf_file": self.gguf_file} if self.gguf_file else options


def find(model: Any) -> Source:
    """Tells a directory, a GGUF file and a hub name apart. Raises InvalidArgumentError for what is none of them."""
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise InvalidArgumentError(
            f"model is {model!r}; a directory, a GGUF file or a hub name is needed", argument="model", got=model
        )
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidArgumentError(
                f"model is the file {path}, which is not a GGUF file",
                hint="give the directory it is in",
                argument="model",
                got=str(model),
            )
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return Source(str(path), files[0].name)
        raise InvalidArgumentError(
            f"directory {path} has no config.json and {len(files)} GGUF files",
            hint="give one GGUF file by name",
            argument="model",
            got=str(model),
        )
    name = str(model)
    if (
        isinstance(model, str)
        and name.count("/") <= 1
        and not name.startswith((".", "/", "~"))
        and not name.endswith((".gguf", "/"))
    ):
        return Source(name)  # a hub name: "owner/name" or "name"
    raise InvalidArgumentError(f"model {name!r} does not exist here and is not a hub name", argument="model", got=name)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    pack_weights: bool | None = None,
) -> LoadedModel:
    """Loads weights, configuration and tokenizer (if there is one) and checks that pages can serve the model.

    ``dtype="auto"``: the checkpoint's own where this processor has products for it, else float32 (16-bit products
    without the instructions are several times slower). ``pack_weights=None``: a packed copy of the linear layers'
    weights is kept where it makes products faster and takes at most a quarter of the available memory.

    Weights come from safetensors or GGUF files only, and no code of a model repository is run. Raises
    InvalidArgumentError for a model that cannot be found or read, UnsupportedError for one that cannot run over pages.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    target = choose_device(device)
    _check_dtype(dtype)
    source = _converted(find(model))
    started = time.perf_counter()
    attention.register()
    try:
        if source.gguf_file:  # reading a GGUF header is slow, so the configuration is taken from the loaded model
            module = AutoModelForCausalLM.from_pretrained(source.location, **source.options, dtype=torch.float32)
            _check_config(module.config)
        else:
            config = AutoConfig.from_pretrained(source.location, **source.options)
            _check_config(config)
            text = config.get_text_config(decoder=True)
            wanted = choose_dtype(dtype, getattr(text, "dtype", None) or getattr(config, "dtype", None), target)
            module = AutoModelForCausalLM.from_pretrained(
                source.location, **source.options, dtype=wanted, use_safetensors=True
            )
    except (OSError, ImportError) as error:
        raise InvalidArgumentError(
            f"model {str(model)!r} could not be read: {error}", argument="model", got=str(model)
        ) from error
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise UnsupportedError(
            f"transformers cannot load {str(model)!r}: {error}", argument="model", got=str(model)
        ) from error
    if source.gguf_file:
        module = module.to(choose_dtype(dtype, torch.float32, target))
    module = module.to(target).eval().requires_grad_(False)
    if not getattr(module, "_supports_attention_backend", False):
        raise UnsupportedError(
            f"{type(module).__name__} does not take its attention through transformers' AttentionInterface",
            hint="a model with _supports_attention_backend is needed: Llama, Mistral, Qwen2/3, Phi3, OPT, ...",
            argument="model",
            got=type(module).__name__,
        )
    module.set_attn_implementation(attention.NAME)
    layers, vocab_size = probe(module)
    if pack_weights or (pack_weights is None and _worth_packing(module)):
        count = linear.pack_linears(module)
        logger.info("packed the weights of %d linear layers", count)
    tokenizer = Tokenizer.load(source.location, **source.options)
    loaded = LoadedModel(
        module=module,
        tokenizer=tokenizer,
        name=str(model),
        layers=layers,
        vocab_size=vocab_size,
        max_model_len=_max_model_len(module.config),
        stop_token_ids=_stop_token_ids(module, tokenizer),
        dtype=next(module.parameters()).dtype,
        device=target,
    )
    logger.info("loaded %s as %s in %.1f s", type(module).__name__, loaded.dtype, time.perf_counter() - started)
    return loaded


def convert_gguf(gguf_file: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> Path:
    """A directory with a GGUF file's model as float32 safetensors, its configuration and its tokenizer; made if it is
    not there.

    Reading GGUF takes half a minute for a 135M model, what is written here a second. ``directory=None``: beside the
    file, named like it. A directory that exists is complete (it is renamed into place) and returned as it is. Raises
    InvalidArgumentError if the file cannot be read.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find(gguf_file)
    if source.gguf_file is None:
        raise InvalidArgumentError(f"{gguf_file} is not a GGUF file", argument="gguf_file", got=str(gguf_file))
    target = Path(directory) if directory is not None else Path(source.location, source.gguf_file).with_suffix("")
    if target.is_dir():
        return target
    logger.info("converting %s to %s", gguf_file, target)
    try:
        module = AutoModelForCausalLM.from_pretrained(source.location, **source.options, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.options)
    except (OSError, ImportError, ValueError) as error:
        raise InvalidArgumentError(
            f"{gguf_file} could not be read: {error}", argument="gguf_file", got=str(gguf_file)
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".unfinished", dir=target.parent))
    unfinished.chmod(0o755)  # mkdtemp makes it private
    try:
        # Not save_pretrained: it refuses a model that was read from a quantised file, though its weights no longer are.
        config = module.config.to_dict()
        config.pop("quantization_config", None)
        type(module.config).from_dict(config | {"architectures": [type(module).__name__]}).save_pretrained(unfinished)
        module.generation_config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        tied = set(getattr(module, "all_tied_weights_keys", None) or ())
        weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items() if name not in tied}
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _converted(source: Source) -> Source:
    """The directory that `convert_gguf` made beside a GGUF file, if it is there and not older: it loads in a second."""
    if source.gguf_file is None:
        return source
    file = Path(source.location, source.gguf_file)
    directory = file.with_suffix("")
    config = directory / "config.json"
    if not config.is_file() or config.stat().st_mtime < file.stat().st_mtime:
        logger.info("reading %s takes long; pagedcore.models.convert_gguf writes it as a directory, once", file)
        return source
    return Source(str(directory))


def probe(module: PreTrainedModel) -> tuple[tuple[attention.LayerShape, ...], int]:
    """Runs two tokens with a probe for attention: the layers in order, and the vocabulary size the logits have.

    Raises UnsupportedError if a layer's attention does not pass through the interface exactly once, layers differ in
    shape, or the model does not compute logits for chosen rows only.
    """
    seen = attention.AttentionProbe()
    name = type(module).__name__
    device = next(module.parameters()).device
    # Kernels that are not torch's own, which some models have, go to the current device, wherever their tensors are.
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with there, torch.inference_mode():
            logits = module(
                input_ids=ids,
                position_ids=torch.arange(2, device=device).unsqueeze(0),
                use_cache=False,
                logits_to_keep=torch.ones(1, dtype=torch.long, device=device),
                pagedcore_step=seen,
            ).logits
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} does not run with paged attention: {error}", argument="model", got=name
        ) from error
    layers = tuple(sorted(seen.layers, key=lambda layer: layer.index))
    expected = module.config.get_text_config(decoder=True).num_hidden_layers
    if [layer.index for layer in layers] != list(range(expected)):
        raise UnsupportedError(
            f"{name} has {expected} layers, but attention was called {len(layers)} times, "
            f"by layers {[layer.index for layer in layers]}",
            hint="every layer must be one attention layer with its own keys and values",
            argument="model",
            got=name,
        )
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim) for layer in layers}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"{name} has attention layers of {len(shapes)} shapes "
            f"(heads, kv heads, head_dim of keys and of values): {sorted(shapes)}",
            hint="all layers must agree",
            argument="model",
            got=name,
        )
    widest = max(layers[0].head_dim, layers[0].v_head_dim)
    if widest > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"{name} has attention heads of head_dim {widest}, the kernels take at most {MAX_HEAD_DIM}",
            argument="model",
            got=name,
        )
    if logits.dim() != 3 or logits.shape[:2] != (1, 1):
        raise UnsupportedError(
            f"{name} gave logits {tuple(logits.shape)} for one row asked of it", argument="model", got=name
        )
    return layers, logits.shape[-1]


# -------------------------------------------------------------------------------------------------------- checks


def _check_dtype(dtype: str | torch.dtype) -> None:
    if dtype != "auto" and dtype not in DTYPES and dtype not in DTYPES.values():
        raise InvalidArgumentError(
            f"dtype is {dtype!r}",
            hint=f"one of auto, {', '.join(DTYPES)}",
            argument="dtype",
            got=dtype,
            expected=("auto", *DTYPES),
        )


def _check_config(config: PreTrainedConfig) -> None:
    """Refuses, before any weight is read, what no probe is needed for."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name} is an encoder-decoder model; a decoder-only one is needed", argument="model", got=name
        )
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _PAGED_LAYERS)
    if others:
        raise UnsupportedError(
            f"{name} has layers of type {', '.join(others)}",
            hint=f"layers must be {' or '.join(sorted(_PAGED_LAYERS))}",
            argument="model",
            got=name,
        )


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary embedding's parameters: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rope_type(parameters: dict[str, Any]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _max_model_len(config: PreTrainedConfig) -> int:
    """Tokens a sequence may have. Where rotary frequencies change with the longest sequence of a batch, only the
    length up to which they do not: beyond it one request's tokens would depend on the others in its step.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    limits: list[Any] = [
        parameters.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or limit
        for parameters in _rope_parameters(text)
        if _rope_type(parameters) in _LENGTH_DEPENDENT_ROPE
    ]
    if limits:
        limit = min(limits)
        logger.info("the rotary embedding changes with length: sequences are limited to %s tokens", limit)
    if not isinstance(limit, int) or limit < 2:
        raise UnsupportedError(
            f"{type(config).__name__} does not say how many positions it has", argument="model", got=limit
        )
    return limit


def _stop_token_ids(module: PreTrainedModel, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end an answer, as transformers' generate takes them: the generation configuration's, which starts
    out as the model configuration's; the tokenizer's only where neither names one.
    """
    ids = getattr(module.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(module.config.get_text_config(decoder=True), "eos_token_id", None)
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(dict.fromkeys(int(i) for i in (ids if isinstance(ids, (list, tuple)) else (ids,))))


def _worth_packing(module: PreTrainedModel) -> bool:
    return (
        linear.can_pack(module) and linear.packed_bytes(module) <= _PACK_MEMORY_SHARE * environment.available_memory()
    )
