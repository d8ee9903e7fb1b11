"""Recognizes models in formats that cannot be served: says what they are, why not, what to do.

Pure: it is given names of files and what is in JSON files.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from distributed_llm.common.model_files import TensorInfo

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Contents = Mapping[str, Any]

_SHOWN_CHARS = 60
_NO_WEIGHTS = f"has a {CONFIG_NAME}, but no weights. Copy *.safetensors of the model there."
_ORIGINAL = (
    "Use the original model: a folder or hub id with config.json and safetensors in bfloat16, "
    "float16 or float32."
)
_ORIGINAL_OR_READ = (
    "Use the original model in bfloat16, float16 or float32, or one that is quantized as GGUF, "
    "GPTQ, AWQ, compressed-tensors, FP8, MXFP4, MLX or bitsandbytes."
)
_CONVERT = (
    "which can run any code when it is read. Use a version of the model with safetensors, or "
    "convert it on a machine that you can afford to lose: AutoModelForCausalLM.from_pretrained"
    "(folder).save_pretrained(new_folder)."
)
_BY_SUFFIX: Mapping[str, str] = {
    ".ggml": f"in GGML, an old format of llama.cpp, which is not read. {_ORIGINAL}",
    ".onnx": f"in ONNX: a finished graph, which cannot be cut into layers. {_ORIGINAL}",
    ".tflite": f"for TensorFlow Lite: a finished graph, which cannot be cut. {_ORIGINAL}",
    ".mlmodel": f"for Core ML: a finished graph, which cannot be cut into layers. {_ORIGINAL}",
    ".engine": f"for TensorRT: a finished program, which cannot be cut into layers. {_ORIGINAL}",
    ".h5": f"in TensorFlow's format, which is not read. {_ORIGINAL}",
    ".msgpack": f"in Flax's format, which is not read. {_ORIGINAL}",
    ".bin": f"a pickle, {_CONVERT}",
    ".pt": f"a pickle, {_CONVERT}",
    ".pth": f"a pickle, {_CONVERT}",
    ".ckpt": f"a pickle, {_CONVERT}",
    ".pkl": f"a pickle, {_CONVERT}",
}
"""What weights in files with these suffixes are."""

_PART_SUFFIXES = frozenset({".safetensors", ".json", ".model", ".txt", ".jinja"})
"""Suffixes of the files of a checkpoint, one of which is not the whole."""

_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""How files begin that trainers leave beside the weights."""

_GGUF = ".gguf"
_ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".tgz", ".zst", ".7z", ".xz"})

_METHODS: Mapping[str, str] = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
QUANTIZATION_NAMES = ("quantization_config", "compression_config", "quantization")
"""Names in config.json of what tells how weights are quantized."""

SETTINGS_BESIDE: Mapping[str, str] = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Methods by the file that a program for quantizing leaves beside config.json."""

_SCALE_ENDINGS = ("scale", "scales", "scale_inv", "scale_weight", "scale_2", "absmax", "scb")
_WIDE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "BOOL", "C64"})
_BUFFER_ENDINGS = frozenset({"bias", "masked_bias", "position_ids"})


def looks_like_file(name: str) -> bool:
    """Return whether `name` ends as files of models do, and model ids of the hub do not."""
    suffix = PurePath(name).suffix.lower()
    parts = _PART_SUFFIXES | _ARCHIVE_SUFFIXES | {_GGUF}
    return suffix in _BY_SUFFIX or suffix in parts


def reason_of_file(name: str, folder: str) -> str:
    """Return why the file `name` in `folder` cannot be served as a model, and what to do."""
    suffix = PurePath(name).suffix.lower()
    if suffix in _BY_SUFFIX:
        return f"is {_BY_SUFFIX[suffix]}"
    if suffix in _PART_SUFFIXES:
        return (
            f"is one file of a model. Give the folder with all of them, perhaps {folder}; it needs "
            f"{CONFIG_NAME} and the weights as safetensors."
        )
    if suffix in _ARCHIVE_SUFFIXES:
        return "is an archive. Unpack it, and give the folder with its config.json."
    return (
        "is a file. Give a folder with config.json and *.safetensors, a GGUF file, or a model id "
        "of the hub."
    )


def reason_of_listing(names: Collection[str], read: Callable[[str], Contents]) -> str | None:
    """Return what a folder without a usable checkpoint holds instead, and what to do; or None.

    Args:
        names: of what is in the folder; those of folders end in "/".
        read: returns the content of a JSON file among them, empty if it cannot be read.
    """
    files = {name for name in names if not name.endswith("/") and not name.startswith(_TRAINING)}
    if "model_index.json" in files:
        return f"holds a diffusers pipeline, which makes pictures or video, not text. {_ORIGINAL}"
    if "adapter_config.json" in files:
        base = read("adapter_config.json").get("base_model_name_or_path")
        of = f" for {_shown(base)}" if base and isinstance(base, str) else ""
        return (
            f"holds a LoRA adapter{of}, which is no model by itself. Merge it into its base model "
            "with peft: AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()"
            ".save_pretrained(folder), and serve that folder."
        )
    if "params.json" in files and any(name.startswith("consolidated.") for name in files):
        return (
            "holds weights in the publisher's own format (params.json, consolidated.*), which is "
            "not read. Use the version of the model for transformers, on the hub often the same "
            "name with -hf or -HF."
        )
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if weights and CONFIG_NAME in files:
        return (
            f"has {weights[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}, by which weights are "
            f"found. If it has all of them, rename it to {SINGLE_NAME}; if it is one of several, "
            f"copy {INDEX_NAME} of the model there."
        )
    if weights:
        return f"has {weights[0]}, but no {CONFIG_NAME}. Copy that of the model there."
    if in_gguf := sorted(name for name in files if name.lower().endswith(_GGUF)):
        return f"has its weights in {in_gguf[0]}, in GGUF. Give that file instead of the folder."
    for suffix, what in _BY_SUFFIX.items():
        of_kind = sorted(name for name in files if PurePath(name).suffix.lower() == suffix)
        if of_kind:
            return f"has its weights in {of_kind[0]}, {what}"
    if any(name.startswith("openvino_") for name in files):
        return f"holds a model for OpenVINO, which cannot be cut into layers. {_ORIGINAL}"
    if "onnx/" in names:
        return f"has its weights in the folder onnx, {_BY_SUFFIX['.onnx']}"
    if CONFIG_NAME in files:
        return _NO_WEIGHTS
    return None


def has_only_config(names: Collection[str]) -> bool:
    """Return whether a folder with these names has a config.json, but no weights of any format."""
    files = {name for name in names if name != INDEX_NAME}
    return reason_of_listing(files, lambda _: {}) == _NO_WEIGHTS


def reason_of_config(config: Contents, names: Collection[str]) -> str:
    """Return why a config.json without model_type is of no use, and what to do.

    Args:
        config: its content.
        names: of the files beside it.
    """
    if "_class_name" in config:
        return f"holds a part of a diffusers pipeline, which makes pictures, not text. {_ORIGINAL}"
    others = {name for name in names if name != CONFIG_NAME}
    has_weights = any(name.endswith(".safetensors") for name in others)
    if not has_weights and (reason := reason_of_listing(others, lambda _: {})):
        return reason
    return f"has a {CONFIG_NAME} without model_type: not that of a Hugging Face model. {_ORIGINAL}"


def quantization(config: Contents) -> str | None:
    """Return how, by its config.json, the weights of a model are quantized, or None."""
    for name in QUANTIZATION_NAMES:
        settings = config.get(name)
        if not isinstance(settings, Mapping):
            continue
        method = settings.get("quant_method")
        if isinstance(method, str):
            return f"{_METHODS.get(method, _shown(method))}{_bits(settings)}"
        if {"group_size", "bits"} <= settings.keys():
            return f"MLX, for Macs{_bits(settings)}"
    if config.get("quantization_config") or config.get("compression_config"):
        return "its config.json does not say by which method"
    return None


def quantization_of_tensors(tensors: Iterable[TensorInfo]) -> str | None:
    """Return how weights are quantized, as tensors show that should be plain numbers, or None.

    Narrow floating-point numbers without scales are no fault: they are what they say.
    """
    narrow, packed, scale = None, None, None
    for tensor in tensors:
        ending = tensor.name.rpartition(".")[2].lower()
        if ending.endswith(_SCALE_ENDINGS):
            scale = scale or tensor
        elif tensor.dtype.startswith("F") and tensor.dtype not in _WIDE_DTYPES:
            narrow = narrow or tensor
        elif tensor.dtype not in _WIDE_DTYPES and len(tensor.shape) > 1:
            packed = packed or (tensor if ending not in _BUFFER_ENDINGS else None)
    if packed:
        scales = "" if scale else ", without the scales that would tell what they mean"
        return f"integers ({packed.dtype} in {packed.name}){scales}"
    if narrow and scale:
        return f"scaled FP8 ({narrow.dtype} in {narrow.name}, multiplied by {scale.name})"
    return None


def quantized(how: str) -> str:
    """Return the sentences about a model whose weights are quantized by `how`."""
    return f"is quantized in a way that is not read: {how}. {_ORIGINAL_OR_READ}"


def _bits(settings: Contents) -> str:
    for name in ("bits", "w_bit"):
        if type(settings.get(name)) is int:
            return f", {settings[name]} bits"
    if settings.get("load_in_4bit"):
        return ", 4 bits"
    return ", 8 bits" if settings.get("load_in_8bit") else ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")
