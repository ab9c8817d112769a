"""Which model a config.json describes, and that model, built without weights."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from annotated_src.chatglm_quantize import quantize_linears
from annotated_src.hf_config import write_chatglm, write_gemma, write_llama, write_phi
from annotated_src.models import chatglm, gemma, llama, phi
from annotated_src.originals import PHI_MSFT_NAMES, read_phi_msft, write_phi_msft
from annotated_src.shards import CheckpointError, read_tensors


class Architecture(NamedTuple):
    """What `load_model` needs to know of a model file."""

    from_hf: Callable[[Mapping[str, Any]], Any]  # config.json to the model's config
    to_hf: Callable[[Any], dict[str, Any]]  # and back
    model: Any
    names: Mapping[str, str]
    classes: Collection[str]  # as `architectures` in config.json calls it
    ignored: tuple[str, ...]  # ends of names; not read if the model lacks them
    embedding_and_head: Collection[str]  # their names in the files
    # Where tie_word_embeddings has such a value in config.json (None: it has none), the
    # files decide: both are one matrix, unless two different ones are stored.
    files_decide_if: Collection[bool | None]
    fused: str | None = None  # how rows lie in a qkv_proj that the model holds as three


ARCHITECTURES = {
    "llama": Architecture(
        llama.LlamaConfig.from_hf,
        write_llama,
        llama.Llama,
        llama.HF_NAMES,
        classes=("LlamaForCausalLM",),
        # Old checkpoints hold the frequencies; .bin files a tied head all the same.
        ignored=(".rotary_emb.inv_freq", "lm_head.weight"),
        embedding_and_head=("model.embed_tokens.weight", "lm_head.weight"),
        files_decide_if=(True,),  # transformers `PreTrainedModel.tie_weights`
    ),
    "gemma": Architecture(
        gemma.GemmaConfig.from_hf,
        write_gemma,
        gemma.Gemma,
        gemma.HF_NAMES,
        classes=("GemmaForCausalLM",),
        ignored=(".rotary_emb.inv_freq", "lm_head.weight"),
        embedding_and_head=("model.embed_tokens.weight", "lm_head.weight"),
        files_decide_if=(True, None),
    ),
    "phi": Architecture(
        phi.PhiConfig.from_hf,
        write_phi,
        phi.Phi,
        phi.HF_NAMES,
        classes=("PhiForCausalLM",),
        ignored=(".rotary_emb.inv_freq",),
        embedding_and_head=(),
        files_decide_if=(),
    ),
    "phi-msft": Architecture(
        read_phi_msft,
        write_phi_msft,
        phi.Phi,
        PHI_MSFT_NAMES,
        classes=(),  # the same as Phi's
        ignored=(".rotary_emb.inv_freq",),
        embedding_and_head=(),
        files_decide_if=(),
        fused="plain",
    ),
    "chatglm": Architecture(
        chatglm.ChatGLMConfig.from_hf,
        write_chatglm,
        chatglm.ChatGLM,
        chatglm.HF_NAMES,
        classes=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        ignored=chatglm.IGNORED,
        embedding_and_head=("transformer.word_embeddings.weight", "lm_head.weight"),
        files_decide_if=(None,),  # the original ties, unless told not to
    ),
}
"""Keyed by the `model_type` of config.json; "phi-msft" are the first files of Phi-2."""


class WithoutInit(TorchFunctionMode):
    """Let modules be built without the random numbers that they start from.

    On the meta device nothing would come of them; but one of them, `normal_`, loads 800
    modules of torch first, seconds and 70 MB, to find that there is nothing to do.

    Source: transformers `initialization.no_init_weights`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


def find_architecture(config: Mapping[str, Any], directory: Path) -> Architecture:
    """Choose by model_type or, where config.json has none, by its first architecture.

    Raises:
        CheckpointError: a model that is not here.
    """
    kind, classes = config.get("model_type"), config.get("architectures")
    if isinstance(kind, str) and kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    if kind is None and isinstance(classes, list):
        for architecture in ARCHITECTURES.values():
            if classes and classes[0] in architecture.classes:
                return architecture
    raise CheckpointError(
        f"{directory / 'config.json'}: model_type is {f'{kind!r:.60}'}, architectures "
        f"{f'{classes!r:.60}'}; known are {', '.join(ARCHITECTURES)}"
    )


def build_without_weights(
    architecture: Architecture, config: Mapping[str, Any], directory: Path
) -> nn.Module:
    """Make the model on the meta device: names, shapes and dtypes, but no memory.

    Raises:
        CheckpointError: config lacks a key, or asks for what the model does not do.
    """
    tied, bits = config.get("tie_word_embeddings"), config.get("quantization_bit")
    two = False
    if tied in architecture.files_decide_if:
        two = not _are_one(directory, architecture.embedding_and_head)
        config = {**config, "tie_word_embeddings": not two}
    try:
        with torch.device("meta"), WithoutInit():
            model = architecture.model(architecture.from_hf(config))
            return quantize_linears(model, bits) if bits else model
    except ValueError as error:
        why = " (the files hold a head that is not the embedding)" if two else ""
        raise CheckpointError(f"{directory / 'config.json'}: {error}{why}") from error


def _are_one(directory: Path, names: Collection[str]) -> bool:
    found: list[Tensor] = []
    for name in reversed(tuple(names)):  # the head first: mostly there is none to read
        found += (tensor for _, tensor in read_tensors(directory, only=[name]))
        if not found:
            return True
    return len(found) < 2 or torch.equal(*found)
